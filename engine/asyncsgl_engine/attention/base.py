"""What an attention implementation is given and must do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..inputs import Batch
from ..kv_cache import KVCache

__all__ = ["AttentionBackend", "LayerCall", "StepContext"]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's share of a step of T tokens.

    Args:
        query: (T, heads, head_dim).
        key: (T, kv_heads, head_dim), not yet in the cache.
        value: as `key`.
        layer: index into the cache.
        scale: factor on the scores.
        window: positions a token sees, its own included; None for all before it.
        softcap: bound of the scores by tanh; None for no bound.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layer: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass(slots=True)
class StepContext:
    """What stays the same for all layers of a step.

    Args:
        batch: the packed inputs.
        cache: keys and values.
        backend: computes the layers.
        masks: an implementation's masks, made in the first layer that needs them.
        calls: layers attended so far.
    """

    batch: Batch
    cache: KVCache
    backend: AttentionBackend
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    calls: int = 0


class AttentionBackend(Protocol):
    """Writes a step's keys and values to their slots, then attends over the cache."""

    needs_slots: bool
    """Whether it reads `Batch.single_slots` (else `Batch.page_table`)."""

    needs_tables: bool
    """Whether it reads `Batch.span_tables` (else the slots of `Batch.spans`)."""

    skips_padding: bool
    """Whether a single row may have no context and a slot below 0, as padding of graphs has."""

    def attend(self, call: LayerCall, context: StepContext) -> torch.Tensor:
        """Attend every token to the cached positions of its sequence up to its own.

        Returns:
            (T, heads, head_dim), in the query's type.
        """
        ...
