"""Attention over pages in Triton: the implementation for CUDA devices."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ..config import ModelFacts
from .base import LayerCall, StepContext

__all__ = ["Tiles", "TritonAttention", "build_triton", "obstacle", "splits_for", "tiles_for"]

_log = logging.getLogger(__name__)

_MOST_GROUP, _LEAST_DIM, _MOST_DIM = 128, 16, 256
_MOST_SPLITS = 64
_LEAST_CAPABILITY = (8, 0)  # copies from global to shared memory ahead of their use
_EVERYTHING = 1 << 30  # a window that no sequence fills
_WRITE_LINES = 8


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernels cut their work; all but the last two are powers of two.

    Args:
        decode: positions that a decoding program takes at once, at least 16.
        lines: query lines (tokens times heads of a group) of a prefill program, at least 16.
        prefill: positions that it takes at once, at least 16.
        warps: of a prefill program.
        stages: loads in flight in its loop.
    """

    decode: int
    lines: int
    prefill: int
    warps: int
    stages: int


def tiles_for(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles that fit the registers and the shared memory of GPUs since Ampere."""
    if dtype is torch.float32:
        # Without tensor cores: what is held in registers is what counts.
        small = Tiles(32, 32, 16, 8, 1) if head_dim > 64 else Tiles(32, 32, 32, 8, 1)
        return Tiles(16, 16, 16, 4, 1) if head_dim > 128 else small
    if head_dim > 128:
        return Tiles(32, 64, 32, 8, 2)
    return Tiles(64, 128, 64, 8, 2)


def splits_for(rows: int, kv_heads: int, longest: int, tile: int, processors: int) -> int:
    """In how many parts to read each context: enough to keep the processors busy.

    Args:
        rows: sequences that decode.
        kv_heads: key heads; each is read by a program of its own.
        longest: the longest context, in tokens.
        tile: tokens that a program takes at once.
        processors: multiprocessors of the device.

    Returns:
        A power of two.
    """
    wanted = min(2 * processors // max(rows * kv_heads, 1), -(-longest // tile), _MOST_SPLITS)
    return 1 << max(wanted.bit_length() - 1, 0)


class TritonAttention:
    """Reads keys and values where they lie; nothing is gathered, padded or made per span.

    Args:
        processors: multiprocessors of the device, for splitting long contexts.
        tiles: how to cut the work; by default what `tiles_for` says.

    Raises:
        ImportError: there is no Triton.
    """

    needs_slots = False
    needs_tables = True
    skips_padding = True

    def __init__(self, processors: int, tiles: Tiles | None = None) -> None:
        from . import triton_kernels

        self._kernels: Any = triton_kernels
        self._processors = processors
        self._tiles = tiles
        self._wide = os.environ.get("TRITON_INTERPRET") == "1"

    @staticmethod
    def takes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
        """Whether a model of these sizes fits the kernels."""
        return (
            dtype in (torch.float32, torch.bfloat16, torch.float16)
            and heads // kv_heads <= _MOST_GROUP
            and head_dim <= _MOST_DIM
        )

    def attend(self, call: LayerCall, context: StepContext) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        call = _dense(call)
        out = torch.empty(call.query.shape, dtype=call.query.dtype, device=call.query.device)
        tiles = self._tiles or tiles_for(call.query.dtype, call.query.shape[2])
        self._write(call, context)
        if context.batch.singles:
            self._decode(call, context, out, tiles)
        if context.batch.spans:
            self._prefill(call, context, out, tiles)
        return out

    def _write(self, call: LayerCall, context: StepContext) -> None:
        tokens, kv_heads, dim = call.key.shape
        lines = tokens * kv_heads
        self._kernels.write[(-(-lines // _WRITE_LINES),)](
            call.key,
            call.value,
            context.cache.keys[call.layer],
            context.cache.values[call.layer],
            context.batch.write_slots,
            lines,
            *call.key.stride()[:2],
            *call.value.stride()[:2],
            KV_HEADS=kv_heads,
            DIM=dim,
            DIM_PAD=_padded(dim),
            LINES=_WRITE_LINES,
        )

    def _decode(
        self, call: LayerCall, context: StepContext, out: torch.Tensor, tiles: Tiles
    ) -> None:
        batch = context.batch
        rows, heads, dim, kv_heads = batch.singles, *call.query.shape[1:], call.key.shape[1]
        splits = splits_for(rows, kv_heads, batch.longest_single, tiles.decode, self._processors)
        parts, sums = out, out
        if splits > 1:
            shape = (rows, heads, splits)
            parts = torch.empty((*shape, dim), dtype=torch.float32, device=out.device)
            sums = torch.empty(shape, dtype=torch.float32, device=out.device)
        group = heads // kv_heads
        self._kernels.decode[(rows, kv_heads, splits)](
            call.query,
            context.cache.keys[call.layer],
            context.cache.values[call.layer],
            batch.page_table,
            batch.single_lengths,
            parts,
            sums,
            *call.query.stride()[:2],
            batch.page_table.stride(0),
            call.scale,
            call.softcap or 1.0,
            call.window or _EVERYTHING,
            KV_HEADS=kv_heads,
            GROUP=group,
            GROUP_PAD=_padded(group),
            DIM=dim,
            DIM_PAD=_padded(dim),
            PAGE_SIZE=context.cache.page_size,
            TILE=tiles.decode,
            SPLITS=splits,
            HAS_SOFTCAP=call.softcap is not None,
            WIDE=self._wide,
            num_warps=8 if group > 32 else 4,
            num_stages=tiles.stages,
        )
        if splits > 1:
            self._kernels.join[(rows * heads,)](
                parts, sums, out, DIM=dim, DIM_PAD=_padded(dim), SPLITS=splits
            )

    def _prefill(
        self, call: LayerCall, context: StepContext, out: torch.Tensor, tiles: Tiles
    ) -> None:
        batch, tables = context.batch, context.batch.span_tables
        if tables is None:
            raise ValueError("the batch was built without page tables of its spans")
        tokens, heads, dim = call.query[batch.singles :].shape
        kv_heads = call.key.shape[1]
        group = heads // kv_heads
        lines = max(tiles.lines, _padded(group))
        block = lines // group
        spans = len(batch.spans)
        self._kernels.prefill[(tokens // block + spans, kv_heads)](
            call.query[batch.singles :],
            context.cache.keys[call.layer],
            context.cache.values[call.layer],
            tables.pages,
            tables.offsets,
            tables.starts,
            out[batch.singles :],
            spans,
            *call.query.stride()[:2],
            tables.pages.stride(0),
            call.scale,
            call.softcap or 1.0,
            call.window or _EVERYTHING,
            KV_HEADS=kv_heads,
            GROUP=group,
            DIM=dim,
            DIM_PAD=_padded(dim),
            PAGE_SIZE=context.cache.page_size,
            TOKENS=block,
            LINES=lines,
            TILE=tiles.prefill,
            HAS_WINDOW=call.window is not None,
            HAS_SOFTCAP=call.softcap is not None,
            WIDE=self._wide,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def build_triton(dtype: torch.dtype, facts: ModelFacts) -> TritonAttention | None:
    """The implementation for the current CUDA device; None, and a warning, where it cannot be.

    Args:
        dtype: of queries, keys and values.
        facts: of the model.
    """
    device = torch.cuda.current_device()
    reason = obstacle(dtype, facts, torch.cuda.get_device_capability(device))
    if reason is None:
        return TritonAttention(torch.cuda.get_device_properties(device).multi_processor_count)
    _log.warning("attention goes without Triton's kernels, and slowly: %s", reason)
    return None


def obstacle(dtype: torch.dtype, facts: ModelFacts, capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot be used; None where they can.

    Args:
        dtype: of queries, keys and values.
        facts: of the model.
        capability: of the device.
    """
    sizes = (facts.num_heads, facts.num_kv_heads, facts.head_dim)
    if not TritonAttention.takes(dtype, *sizes):
        return f"they do not fit {dtype} with (heads, key heads, head size) = {sizes}"
    if capability < _LEAST_CAPABILITY:
        return f"they need compute capability 8.0, and this device has {capability}"
    if find_spec("triton") is None:
        return "Triton is missing; pip install 'asyncsgl[gpu]' brings it"
    return None


def _padded(size: int) -> int:
    """The power of two that tiles of matrix products need."""
    return max(1 << (size - 1).bit_length(), _LEAST_DIM)


def _dense(call: LayerCall) -> LayerCall:
    """With the elements of each head beside each other."""
    parts = (call.query, call.key, call.value)
    if all(part.stride(2) == 1 for part in parts):
        return call
    query, key, value = (part.contiguous() for part in parts)
    return LayerCall(query, key, value, call.layer, call.scale, call.window, call.softcap)
