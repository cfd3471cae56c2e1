"""The device boundary: a plan goes in, drawn tokens come out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from .attention import AttentionBackend, TorchAttention
from .config import ResolvedConfig
from .forward import Forward
from .graphs import Capture, CudaGraphs, StaticInputs, capture_all, ladder
from .image_rows import ImageRows
from .inputs import InputBuilder
from .kv_cache import KVCache
from .logprobs import LogprobReporter
from .lowering import lower
from .model_pass import ModelPass
from .native import Library, NativeSampling
from .plan import Plan, Row, Seat
from .recipe import PreparedModel
from .sampler import Sampler

if TYPE_CHECKING:
    from .model import LoadedModel

__all__ = ["ModelRunner"]


_TRIED, _SPREAD = 12, 7919  # tokens, taken from all over the vocabulary


Lead = Callable[[Plan], AbstractContextManager[None]]


def _alone(_: Plan) -> AbstractContextManager[None]:
    return nullcontext()


class ModelRunner:
    """Owns the model, the cache and everything else that lives on the device.

    Args:
        model: loaded, on its device; or prepared.
        config: sizes; its facts are the model's.
        attention: computes the layers; PyTorch's operators by default.
        capture: records decoding steps where the configuration wants that; by default as CUDA
            graphs.
        library: compiled code, for models that it can compute as a whole.
        lead: entered around each forward pass, so that the other tensor-parallel ranks, whose
            runners `compute` what this one runs, do the same.

    Raises:
        ModelError: the model does not send its attention through transformers' interface.
        NotAsBefore: the model is prepared, and its logits are other ones now.

    Attributes:
        proof: that compiled code computes the model; None where it does not, or not all of it.
    """

    def __init__(
        self,
        model: LoadedModel | PreparedModel,
        config: ResolvedConfig,
        attention: AttentionBackend | None = None,
        library: Library | None = None,
        capture: Capture | None = None,
        lead: Lead = _alone,
    ) -> None:
        facts, device = model.facts, torch.device(config.device)
        attention = attention if attention is not None else TorchAttention()
        self._cache = KVCache(
            facts.num_layers,
            config.num_pages,
            config.page_size,
            facts.num_kv_heads,
            facts.head_dim,
            getattr(torch, config.dtype),
            device,
        )
        slots = config.max_running_requests
        most_pages = -(-config.sequence_limit // config.page_size)
        self._inputs = InputBuilder(
            slots,
            config.page_size,
            most_pages,
            attention.needs_slots,
            device,
            attention.needs_tables,
        )
        self._images = ImageRows(device)
        self._lead = lead
        sampling = None
        if library is not None and device.type == "cpu":
            sampling = NativeSampling(library, config.num_threads)
        self._sampler = Sampler(slots, facts.vocab_size, device, sampling)
        self._reporter = LogprobReporter(slots, facts.vocab_size, sampling)
        self._limit = config.sequence_limit
        self._vocab = facts.vocab_size
        lowered = lower(model, self._cache, attention, config, library, self._try_out)
        self.proof = lowered.proof
        forward = lowered.forward
        self._forward: Forward = forward
        if config.cuda_graph_max_bs and attention.skips_padding:
            most = config.cuda_graph_max_bs
            inputs = StaticInputs(most, most_pages, config.page_size, device)
            captured = capture_all(forward.forward, ladder(most), inputs, capture or CudaGraphs())
            self._forward = captured or forward

    @torch.inference_mode()
    def seat(self, seat: Seat) -> None:
        """Take over a sequence that got a slot."""
        self._images.seat(seat.slot, seat.request.images)
        self._sampler.seat(seat)
        self._reporter.seat(seat.slot, seat.request)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> ModelPass:
        """See `Runner`."""
        with self._lead(plan):
            logits = self.compute(plan)
        self._sampler.note(plan.rows)
        return ModelPass(plan, logits, self._sampler, self._reporter)

    @torch.inference_mode()
    def compute(self, plan: Plan) -> torch.Tensor:
        """The forward pass alone: logits of the rows that want any, (R, vocab)."""
        self._cache.copy(plan.copies)
        batch = self._inputs.build(plan, self._images.read(plan), self._sampler.drawn)
        with record_function("asyncsgl::forward"):
            return self._forward.forward(batch)

    @torch.inference_mode()
    def _try_out(self, forward: Forward) -> torch.Tensor:
        """A few tokens through the whole model: faults show here, not in a user's request.

        Returns:
            Logits after each of them but the first, the last of them computed as in decoding.
        """
        vocab = self._vocab
        tokens = [index * _SPREAD % vocab for index in range(min(_TRIED, self._limit))]
        count = len(tokens)
        pages = range(-(-count // self._cache.page_size))
        targets = tokens[1:]
        rows = [
            Row(0, tokens, 0, pages, 0, 0, targets, sample=False),
            Row(0, tokens[-1:], count - 1, pages, 0, 1, (), sample=True),
        ]
        batches = [self._inputs.build(Plan((row,))) for row in rows]
        logits = [forward.forward(batch).to(torch.float32, copy=True) for batch in batches]
        return torch.cat(logits)
