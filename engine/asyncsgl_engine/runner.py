"""The device boundary: a plan goes in, drawn tokens come out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import record_function

from .attention import AttentionBackend, TorchAttention
from .config import ResolvedConfig
from .forward import Forward
from .graphs import Capture, CudaGraphs, StaticInputs, capture_all, ladder
from .inputs import InputBuilder
from .kv_cache import KVCache
from .logprobs import describe
from .lowering import lower
from .model import LoadedModel
from .native import Library
from .plan import Mask, Outcome, Plan, Row, Seat
from .request import Request, TokenLogprob
from .sampler import Sampler
from .transfer import upload

__all__ = ["ModelRunner"]


_TRIED, _SPREAD = 12, 7919  # tokens, taken from all over the vocabulary


def _no_mask() -> Mask | None:
    return None


class ModelRunner:
    """Owns the model, the cache and everything else that lives on the device.

    Args:
        model: loaded, on its device.
        config: sizes; its facts are the model's.
        attention: computes the layers; PyTorch's operators by default.
        capture: records decoding steps where the configuration wants that; by default as CUDA
            graphs.
        library: compiled code, for models that it can compute as a whole.

    Raises:
        ModelError: the model does not send its attention through transformers' interface.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: ResolvedConfig,
        attention: AttentionBackend | None = None,
        library: Library | None = None,
        capture: Capture | None = None,
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
        self._sampler = Sampler(slots, facts.vocab_size, device)
        self._requests: dict[int, Request] = {}
        self._limit = config.sequence_limit
        self._vocab = facts.vocab_size
        forward = lower(model, self._cache, attention, config, library, self._try_out)
        self._forward: Forward = forward
        if config.cuda_graph_max_bs and attention.skips_padding:
            most = config.cuda_graph_max_bs
            inputs = StaticInputs(most, most_pages, config.page_size, device)
            captured = capture_all(forward.forward, ladder(most), inputs, capture or CudaGraphs())
            self._forward = captured or forward

    def seat(self, seat: Seat) -> None:
        """Take over a sequence that got a slot."""
        self._requests[seat.slot] = seat.request
        self._sampler.seat(seat)

    @torch.inference_mode()
    def run(self, plan: Plan, mask: Callable[[], Mask | None] = _no_mask) -> Outcome:
        """Compute a plan.

        Args:
            plan: its sequences are seated.
            mask: called after the forward pass for what grammars allow.
        """
        self._cache.copy(plan.copies)
        batch = self._inputs.build(plan)
        with record_function("asyncsgl::forward"):
            logits = self._forward.forward(batch)
        for row in plan.rows:
            self._sampler.note(row.slot, row.tokens, row.start)
        drawn = [index for index, row in enumerate(plan.rows) if row.sample]
        tokens = [-1] * len(plan.rows)
        if drawn:
            rows = [plan.rows[index] for index in drawn]
            made = self._draw(logits[: len(drawn)], rows, _within(mask(), drawn))
            for index, token in zip(drawn, made, strict=True):
                tokens[index] = token
        return Outcome(
            tokens,
            self._logprobs(plan, logits, drawn, tokens),
            self._scores(plan, logits, len(drawn)),
        )

    def _draw(self, logits: torch.Tensor, rows: list[Row], mask: Mask | None) -> list[int]:
        slots = [row.slot for row in rows]
        lengths = [row.start + len(row.tokens) for row in rows]
        return self._sampler.draw(logits, slots, lengths, mask)

    def _logprobs(
        self, plan: Plan, logits: torch.Tensor, drawn: list[int], tokens: list[int]
    ) -> dict[int, TokenLogprob]:
        found: dict[int, TokenLogprob] = {}
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for place, index in enumerate(drawn):
            request = self._requests[plan.rows[index].slot]
            if request.return_logprob:
                asked = (request.top_logprobs_num, request.token_ids_logprob)
                groups.setdefault(asked, []).append(place)
        for (top, ids), places in groups.items():
            part = logits[upload(np.array(places, dtype=np.int64), logits.device)]
            entries = describe(part, [tokens[drawn[place]] for place in places], top, ids)
            found.update({drawn[place]: e for place, e in zip(places, entries, strict=True)})
        return found

    def _scores(
        self, plan: Plan, logits: torch.Tensor, begin: int
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        found: dict[int, tuple[TokenLogprob, ...]] = {}
        for index, row in enumerate(plan.rows):
            if row.targets:
                request = self._requests[row.slot]
                end = begin + len(row.targets)
                found[index] = tuple(
                    describe(
                        logits[begin:end],
                        row.targets,
                        request.top_logprobs_num,
                        request.token_ids_logprob,
                    )
                )
                begin = end
        return found

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


def _within(mask: Mask | None, drawn: list[int]) -> Mask | None:
    """The mask with row indices counted among the drawn rows."""
    if mask is None:
        return None
    place = {index: number for number, index in enumerate(drawn)}
    return Mask([place[index] for index in mask.rows], mask.bits)
