"""Memory for weights that every step reads from front to back."""

from __future__ import annotations

import contextlib
import mmap

import torch

__all__ = ["Arena"]

_HUGE = 2 << 20
_BLOCK = 64 << 20
_LINE = 64


class Arena:
    """Hands out parts of large blocks, in huge pages where the system has them.

    With pages of 4 KiB a step through 270 MB of weights looks up 66,000 addresses, and on a
    virtual machine each of these takes many steps itself. Blocks live as long as tensors in them.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements, not set to anything, that begin with a cache line."""
        size = -(-count * dtype.itemsize // _LINE) * _LINE
        if self._block.numel() < size:
            self._block = _huge_pages(max(size, _BLOCK))
        part, self._block = self._block[:size], self._block[size:]
        return part[: count * dtype.itemsize].view(dtype)


def _huge_pages(size: int) -> torch.Tensor:
    """At least `size` bytes of fresh memory, aligned to huge pages; uint8."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    size = -(-size // _HUGE) * _HUGE
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % _HUGE
    return whole[begin : begin + size]
