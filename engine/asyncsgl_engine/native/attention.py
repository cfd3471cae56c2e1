"""One layer's attention in C, for models whose forward pass is transformers'."""

from __future__ import annotations

import ctypes

import torch

from ..attention.base import LayerCall, StepContext
from .build import SUFFIXES, Library
from .step import MOST_DIM, MOST_GROUP, Step, Workspace

__all__ = ["NativeAttention"]


class _Attention(ctypes.Structure):
    """`Attention` of decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "key_row", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_row", "value_head")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class NativeAttention:
    """Reads keys and values where they lie, page by page: nothing is gathered or padded.

    Args:
        library: what `build_library` gave.
        threads: to compute with.
    """

    needs_slots = False
    needs_tables = False
    skips_padding = False

    def __init__(self, library: Library, threads: int) -> None:
        self._threads = threads
        self._workspace = Workspace()
        self._step: tuple[StepContext, Step] | None = None
        self._attend = {d: library.function("asyncsgl_attend", d) for d in SUFFIXES}
        self._space = {d: library.function("asyncsgl_attend_space", d) for d in SUFFIXES}
        for function in self._space.values():
            function.restype = ctypes.c_int64

    @staticmethod
    def takes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
        """Whether a model of these sizes fits the compiled code."""
        fits = heads % kv_heads == 0 and heads // kv_heads <= MOST_GROUP
        return dtype in SUFFIXES and fits and head_dim <= MOST_DIM and head_dim % 2 == 0

    def attend(self, call: LayerCall, context: StepContext) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        step = self._step_of(context)
        tokens, heads, dim = call.query.shape
        query, key, value = (_dense(part) for part in (call.query, call.key, call.value))
        out = torch.empty((tokens, heads, dim), dtype=query.dtype)
        described = _Attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            context.cache.keys[call.layer].data_ptr(),
            context.cache.values[call.layer].data_ptr(),
            out.data_ptr(),
            heads,
            key.shape[1],
            dim,
            call.window or 0,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            call.scale,
            call.softcap or 0.0,
        )
        references = ctypes.byref(described), ctypes.byref(step.structure)
        step.use(self._workspace.of(self._space[query.dtype](*references)))
        self._attend[query.dtype](*references)
        return out

    def _step_of(self, context: StepContext) -> Step:
        """The step's layout, made in its first layer."""
        if self._step is None or self._step[0] is not context:
            made = Step(context.batch, context.cache.page_size, self._threads)
            self._step = context, made
        return self._step[1]


def _dense(part: torch.Tensor) -> torch.Tensor:
    """With its elements of one head beside each other."""
    return part if part.stride(2) == 1 else part.contiguous()
