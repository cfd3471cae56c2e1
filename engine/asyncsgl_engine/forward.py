"""What turns a batch into logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from .attention import AttentionBackend, StepContext
from .errors import ModelError
from .inputs import Batch
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .model import LoadedModel

__all__ = ["Forward", "ForwardBySize", "ModuleForward"]


class Forward(Protocol):
    """One packed forward pass."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute a batch, its keys and values into the cache.

        Returns:
            Logits of the batch's R `logit_rows`, (R, vocab), any float type; valid until the
            next call.
        """
        ...


class ModuleForward:
    """Transformers' own module, its attention over the engine's pages.

    Args:
        model: loaded, on its device.
        cache: keys and values.
        attention: computes the layers' attention.
    """

    def __init__(self, model: LoadedModel, cache: KVCache, attention: AttentionBackend) -> None:
        self._model, self._cache, self._attention = model, cache, attention

    def forward(self, batch: Batch) -> torch.Tensor:
        """See `Forward`.

        Raises:
            ModelError: the module does not attend through transformers' interface.
        """
        context = StepContext(batch, self._cache, self._attention)
        embeddings = None
        if batch.inserts is not None:
            embeddings = batch.embedded(self._model.module.get_input_embeddings())
        logits = self._model.logits(
            batch.input_ids, batch.position_ids, batch.logit_rows, context, embeddings
        )
        facts = self._model.facts
        if context.calls != facts.num_layers:
            raise ModelError(
                f"{facts.architecture} attended {context.calls} times in {facts.num_layers} "
                "layers: its attention does not go through transformers' attention interface"
            )
        return logits


class ForwardBySize:
    """One way for small batches, another for large ones.

    Args:
        small, large: both over the same cache.
        tokens: from so many on a batch is large.
    """

    def __init__(self, small: Forward, large: Forward, tokens: int) -> None:
        self._small, self._large, self._tokens = small, large, tokens

    @property
    def parts(self) -> tuple[Forward, Forward]:
        """Both ways."""
        return self._small, self._large

    def forward(self, batch: Batch) -> torch.Tensor:
        """See `Forward`."""
        chosen = self._large if batch.input_ids.shape[1] >= self._tokens else self._small
        return chosen.forward(batch)
