"""The function transformers' attention modules call."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from ..errors import InternalError
from .base import LayerCall, StepContext

__all__ = ["IMPLEMENTATION", "register"]

IMPLEMENTATION = "asyncsgl_paged"


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - always None, see `register`
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: StepContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim)."""
    if paged is None:
        raise InternalError(f"{IMPLEMENTATION} attention was called outside of an engine step")
    call = LayerCall(
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
    )
    paged.calls += 1
    return paged.backend.attend(call, paged).unsqueeze(0), None


def register() -> None:
    """Make the implementation known to transformers; doing it again is harmless.

    No mask function is registered under the name, so transformers builds no masks.
    """
    AttentionInterface.register(IMPLEMENTATION, _forward)
