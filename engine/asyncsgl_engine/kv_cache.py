"""The keys and values of all layers, in pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .plan import PageCopy

__all__ = ["KVCache"]


class KVCache:
    """One pool for all layers; token `t` of page `p` is at slot p * page_size + t.

    Memory is reserved at once and touched only as pages are used.

    Args:
        layers: layers with attention.
        pages: pages, each the same in every layer.
        page_size: tokens in a page.
        kv_heads: heads in a layer.
        head_dim: elements of a head.
        dtype: of the elements.
        device: where it lives.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        shape = (2, layers, pages * page_size, kv_heads, head_dim)
        self._pool = torch.empty(shape, dtype=dtype, device=device)
        self.keys = tuple(self._pool[0].unbind(0))  # each [slots, kv_heads, head_dim]
        self.values = tuple(self._pool[1].unbind(0))

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy the beginnings of pages to other pages, in order."""
        for copy in copies:
            source = copy.source * self.page_size
            target = copy.target * self.page_size
            self._pool[:, :, target : target + copy.tokens] = self._pool[
                :, :, source : source + copy.tokens
            ]
