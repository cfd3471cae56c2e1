"""Triton kernels for what lies between the matrix products of a layer; imported on first use.

Each replaces several of PyTorch's launches, whose fixed cost weighs most when few tokens are
decoded. They round to the element type where transformers' modules do.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_norm", "gate", "rotate"]


@triton.jit
def _normal(
    values: tl.tensor, weight: tl.tensor, epsilon: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019) of float32 values, in the weight's type."""
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + epsilon)
    even = (values * scale).to(weight.dtype).to(tl.float32)
    return (even * weight.to(tl.float32)).to(weight.dtype)


@triton.jit
def add_norm(
    stream: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    HAS_DELTA: tl.constexpr,
) -> None:
    """Add `delta` to `stream` in place, and give the sum's norm; a program for each row.

    Args:
        stream: (rows, WIDTH); `delta` and `out` alike.
        weight: (WIDTH,).
    """
    column = tl.arange(0, WIDTH_PAD)
    inside = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    values = tl.load(stream + place, mask=inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + place, mask=inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(stream + place, values, mask=inside)
    factors = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + place, _normal(values.to(tl.float32), factors, epsilon, WIDTH), mask=inside)


@triton.jit
def rotate(
    packed: tl.tensor,
    positions: tl.tensor,
    table: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    epsilon: tl.tensor,
    packed_row: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HAS_NORMS: tl.constexpr,
) -> None:
    """Turn queries and keys by their positions, in place (Su et al. 2021, in halves).

    Program (token, head) takes one head; those from HEADS on are keys.

    Args:
        packed: queries, keys and values of each token, one after another.
        positions: (tokens,).
        table: (2, DIM / 2) float32 for each position: cosines, then sines.
        query_norm: (DIM,), what each head of the queries is normalised with before; `key_norm`
            of the keys. Not read without HAS_NORMS.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, HALF_PAD)
    inside = column < DIM // 2
    place = packed + token.to(tl.int64) * packed_row + head * DIM + column
    raw_low = tl.load(place, mask=inside, other=0.0)
    low = raw_low.to(tl.float32)
    high = tl.load(place + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORMS:
        weight = query_norm
        if head >= HEADS:
            weight = key_norm
        scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / DIM + epsilon)
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        low = ((low * scale).to(raw_low.dtype).to(tl.float32) * factor).to(raw_low.dtype)
        factor = tl.load(weight + DIM // 2 + column, mask=inside, other=0.0).to(tl.float32)
        high = ((high * scale).to(raw_low.dtype).to(tl.float32) * factor).to(raw_low.dtype)
        low, high = low.to(tl.float32), high.to(tl.float32)
    angle = table + tl.load(positions + token) * DIM + column
    cosine = tl.load(angle, mask=inside, other=0.0)
    sine = tl.load(angle + DIM // 2, mask=inside, other=0.0)
    tl.store(place, low * cosine - high * sine, mask=inside)
    tl.store(place + DIM // 2, high * cosine + low * sine, mask=inside)


@triton.jit
def gate(
    packed: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """SiLU of the first half of each row, times the second; program (row, block of columns).

    Args:
        packed: (rows, 2 * WIDTH).
        out: (rows, WIDTH).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gated = tl.load(packed + row * 2 * WIDTH + column, mask=inside, other=0.0)
    value = tl.load(packed + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0)
    wide = gated.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gated.dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, active * value.to(tl.float32), mask=inside)
