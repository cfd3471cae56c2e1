"""One check for every attention implementation: against the plain formula, in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncsgl_engine.attention import AttentionBackend, LayerCall, StepContext
from asyncsgl_engine.inputs import InputBuilder
from asyncsgl_engine.kv_cache import KVCache
from asyncsgl_engine.plan import Plan, Row

__all__ = ["LENGTHS", "Shape", "check"]

LENGTHS = ((0, 1), (36, 1), (100, 1), (15, 1), (0, 40), (50, 30), (31, 2))
"""Rows of a step: tokens that are cached, tokens that are computed."""

_CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    heads: int
    kv_heads: int
    dim: int
    page_size: int
    window: int | None = None
    softcap: float | None = None


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    """One token's query (heads, dim) over its whole context (n, kv_heads, dim), in float64."""
    group = query.shape[0] // keys.shape[1]
    keys = keys.double().repeat_interleave(group, dim=1)
    values = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,nhd->hn", query.double(), keys) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.window is not None:
        scores[:, : max(keys.shape[0] - call.window, 0)] = -math.inf
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), values)


def check(
    backend: AttentionBackend,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    close: float | None = None,
) -> None:
    """One layer of one step over random pages: all is written, and every token is close.

    Args:
        close: how close, absolutely and relatively; by default what the type gives on a CPU.
    """
    draw = random.Random(1)
    torch.manual_seed(1)
    size = shape.page_size
    count = sum(-(-(start + new) // size) for start, new in lengths)
    pages = list(range(count + 3))
    draw.shuffle(pages)
    rows = []
    for slot, (start, new) in enumerate(lengths):
        own = [pages.pop() for _ in range(-(-(start + new) // size))]
        rows.append(Row(slot, [1] * new, start, own, 0, new, (), sample=True))
    cache = KVCache(2, count + 3, size, shape.kv_heads, shape.dim, dtype, device)
    for part in (cache.keys[1], cache.values[1]):
        part.fill_(math.nan)  # what was never written must not matter
    for row in rows:
        for position in range(row.start):
            slot = row.pages[position // size] * size + position % size
            cache.keys[1][slot].normal_()
            cache.values[1][slot].normal_()
    builder = InputBuilder(
        len(rows), size, count, backend.needs_slots, device, backend.needs_tables
    )
    batch = builder.build(Plan(tuple(rows)))
    total = sum(new for _, new in lengths)
    # As transformers gives them: views of (1, T, heads, dim), some of one wide projection.
    parts = [shape.heads, shape.kv_heads, shape.kv_heads]
    wide = torch.randn(total, sum(parts), shape.dim, device=device).to(dtype)
    query, key, value = torch.split(wide, parts, dim=1)
    call = LayerCall(query, key, value, 1, shape.dim**-0.5, shape.window, shape.softcap)
    out = backend.attend(call, StepContext(batch, cache, backend))
    bound = _CLOSE[dtype] if close is None else close
    begin = 0
    for row in rows:
        slots = [
            row.pages[position // size] * size + position % size
            for position in range(row.start + len(row.tokens))
        ]
        keys, values = cache.keys[1][slots], cache.values[1][slots]
        for offset in range(len(row.tokens)):
            end = row.start + offset + 1
            assert torch.equal(keys[end - 1], call.key[begin])
            assert torch.equal(values[end - 1], call.value[begin])
            expected = reference(call.query[begin], keys[:end], values[:end], call)
            torch.testing.assert_close(out[begin].double(), expected, atol=bound, rtol=bound)
            begin += 1
