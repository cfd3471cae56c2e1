"""Draws and describes tokens in C."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from ..drawing import Draws
from ..plan import Mask
from .build import Library
from .step import Workspace, address

__all__ = ["NativeSampling"]

Pointer = ctypes.c_void_p
Ints = npt.NDArray[np.int64]


class _Draw(ctypes.Structure):
    """`Draw` of sampling.h."""

    _fields_ = (
        *((name, Pointer) for name in ("logits", "allowed", "heat", "top_p", "min_p", "chance")),
        *((name, Pointer) for name in ("top_k", "tokens")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "words", "threads")),
        ("workspace", Pointer),
    )


class _Describe(ctypes.Structure):
    """`Describe` of sampling.h."""

    _fields_ = (
        *((name, Pointer) for name in ("logits", "totals", "ids")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "top", "threads")),
        ("workspace", Pointer),
    )


class NativeSampling:
    """Reads logits where they lie; a row costs one or two passes over them, in one thread.

    Args:
        library: what `build_library` gave.
        threads: to compute with.
    """

    def __init__(self, library: Library, threads: int) -> None:
        self._draw = library.function("asyncsgl_draw")
        self._describe = library.function("asyncsgl_describe")
        self._space = library.function("asyncsgl_sampling_space")
        self._space.restype = ctypes.c_int64
        self._threads = threads
        self._workspace = Workspace()

    def draw(self, logits: torch.Tensor, draws: Draws, mask: Mask | None) -> torch.Tensor:
        """See `Drawer.draw`."""
        logits = _plain(logits)
        rows, vocab = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        lines, allowed, words = _lines(logits), np.zeros(rows, dtype=np.int64), 0
        if mask is not None:
            bits = np.ascontiguousarray(mask.bits)
            allowed[np.asarray(mask.rows)] = address(bits) + bits.strides[0] * np.arange(len(bits))
            words = bits.shape[1]
        settings = (draws.heat, draws.top_p, draws.min_p, draws.chance, draws.top_k)
        columns = [lines, allowed, *map(np.ascontiguousarray, settings)]
        described = _Draw(
            *map(address, columns),
            tokens.data_ptr(),
            *(rows, vocab, words, self._threads),
            self._room(vocab),
        )
        self._draw(ctypes.byref(described))
        return tokens

    def describe(
        self, logits: torch.Tensor, rows: Ints, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Describer.describe`."""
        logits = _plain(logits)
        vocab = logits.shape[1]
        lines = _lines(logits)[rows]
        totals = torch.empty(len(rows), dtype=torch.float64)
        ids = torch.empty((len(rows), top), dtype=torch.int64)
        described = _Describe(
            *(address(lines), totals.data_ptr(), ids.data_ptr()),
            *(len(rows), vocab, top, self._threads),
            self._room(vocab),
        )
        self._describe(ctypes.byref(described))
        return totals, ids

    def _room(self, vocab: int) -> int:
        size = self._space(ctypes.c_int64(vocab), ctypes.c_int64(self._threads))
        return self._workspace.of(size).data_ptr()


def _plain(logits: torch.Tensor) -> torch.Tensor:
    """In float32, each row's logits beside one another; a copy only where they are not."""
    logits = logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _lines(logits: torch.Tensor) -> Ints:
    """Where each row begins."""
    rows: Ints = np.arange(len(logits), dtype=np.int64)
    return logits.data_ptr() + rows * (logits.stride(0) * logits.element_size())
