"""Triton kernels for attention over pages; imported on first use, since Triton is optional.

Keys and values lie as in `KVCache`: [slots, kv_heads, dim], token `t` of page `p` at slot
p * page_size + t, the elements of a head beside each other. All query heads that share a key
head (a group) are computed together, so that keys and values are read once.

The softmax is taken in one pass with a running maximum (Milakov and Gimelshein 2018), tile by
tile as in FlashAttention-2 (Dao 2023); decoding is split over the context and joined by
log-sum-exp as in Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decode", "join", "prefill", "write"]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["lines"])
def write(
    key: tl.tensor,
    value: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    lines: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """Copy keys and values to their slots; a token whose slot is negative is left out.

    Args:
        lines: tokens times KV_HEADS; each program copies LINES of them.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    token, head = line // KV_HEADS, line % KV_HEADS
    slot = tl.load(slots + token, mask=line < lines, other=-1)
    column = tl.arange(0, DIM_PAD)
    inside = (slot >= 0)[:, None] & (column < DIM)[None, :]
    target = ((slot * KV_HEADS + head) * DIM)[:, None] + column[None, :]
    source = (token * key_row + head * key_head)[:, None] + column[None, :]
    tl.store(keys + target, tl.load(key + source, mask=inside), mask=inside)
    source = (token * value_row + head * value_head)[:, None] + column[None, :]
    tl.store(values + target, tl.load(value + source, mask=inside), mask=inside)


@triton.jit
def _bounded(scores: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """The scores, bounded: softcap * tanh(scores / softcap), with what Triton has everywhere."""
    return softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))


@triton.jit
def _product(left: tl.tensor, right: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """In float32 and without TF32; WIDE converts first, as the interpreter needs for bfloat16."""
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _sweep(
    state: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    until: tl.tensor,
    end: tl.tensor,
    wanted: tl.tensor,
    position: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    SLOT: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Take the tiles that start in [begin, until) into a running softmax.

    Args:
        state: output so far (M, DIM_PAD), largest score (M,), sum of weights (M,); scores are
            in units of log 2.
        query: (M, DIM_PAD).
        keys: of the head, at slot 0; a slot is SLOT elements.
        table: pages of the sequence.
        end: positions from here on are not read.
        wanted: (M,), lines that count.
        position: (M,), of each line; with CAUSAL it sees none after it, and with HAS_WINDOW only
            so many up to its own.
    """
    total, most, weight = state
    column = tl.arange(0, DIM_PAD)
    for at in range(begin, until, TILE):  # pyright: ignore[reportArgumentType]
        positions = at + tl.arange(0, TILE)
        exists = positions < end
        page = tl.load(table + positions // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + positions % PAGE_SIZE
        place = slot[:, None] * SLOT + column[None, :]
        inside = exists[:, None] & (column < DIM)[None, :]
        key = tl.load(keys + place, mask=inside, other=0.0)
        scores = _product(query, tl.trans(key), WIDE) * scale
        if HAS_SOFTCAP:
            scores = _bounded(scores, softcap)
        seen = wanted[:, None] & exists[None, :]
        if CAUSAL:
            seen = seen & (positions[None, :] <= position[:, None])
        if CAUSAL and HAS_WINDOW:
            seen = seen & (positions[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        # A line that has seen nothing yet has no largest score to subtract.
        level = tl.where(new == float("-inf"), 0.0, new)
        shares = tl.exp2(scores - level[:, None])
        fade = tl.exp2(most - level)
        value = tl.load(values + place, mask=inside, other=0.0)
        total = total * fade[:, None] + _product(shares.to(value.dtype), value, WIDE)
        weight = weight * fade + tl.sum(shares, 1)
        most = new
    return total, most, weight  # pyright: ignore[reportReturnType]


@triton.jit(do_not_specialize=["window"])
def decode(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    table_row: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Rows of one token: program (row, kv head, split) attends to its share of the context.

    Args:
        lengths: context of each row, its own token included; 0 gives zeros.
        out: [rows, heads, SPLITS, DIM].
        sums: [rows, heads, SPLITS], log-sum-exp of each split's scores in units of log 2;
            not written with one split.
        window: positions a token sees.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    member, column = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD)
    inside = (member < GROUP)[:, None] & (column < DIM)[None, :]
    index = head * GROUP + member
    asked = tl.load(
        query + row * query_row + index[:, None] * query_head + column[None, :],
        mask=inside,
        other=0.0,
    )
    total = tl.zeros([GROUP_PAD, DIM_PAD], dtype=tl.float32)
    most = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([GROUP_PAD], dtype=tl.float32)
    total, most, weight = _sweep(
        (total, most, weight),
        asked,
        keys + head * DIM,
        values + head * DIM,
        table + row * table_row,
        begin,
        end,
        end,
        member < GROUP,
        member,
        window,
        scale,
        softcap,
        KV_HEADS * DIM,
        DIM,
        DIM_PAD,
        PAGE_SIZE,
        TILE,
        False,
        False,
        HAS_SOFTCAP,
        WIDE,
    )
    place = ((row * KV_HEADS * GROUP + index) * SPLITS + split).to(tl.int64)
    divisor = tl.where(weight > 0.0, weight, 1.0)  # a share of the context may be empty
    result = total / divisor[:, None]
    tl.store(out + place[:, None] * DIM + column[None, :], result, mask=inside)
    if SPLITS > 1:
        tl.store(sums + place, most + tl.log2(divisor), mask=member < GROUP)


@triton.jit
def join(
    parts: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Weigh the splits of one head of one row by their sums; see `decode`.

    Args:
        out: [rows * heads, DIM].
    """
    line = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, DIM_PAD)
    sizes = tl.load(sums + line * SPLITS + split)
    most = tl.max(sizes, 0)
    weights = tl.exp2(sizes - tl.where(most == float("-inf"), 0.0, most))
    part = tl.load(
        parts + (line * SPLITS + split)[:, None] * DIM + column[None, :],
        mask=(column < DIM)[None, :],
        other=0.0,
    )
    total = tl.sum(part * weights[:, None], 0)
    weight = tl.sum(weights, 0)
    result = total / tl.where(weight > 0.0, weight, 1.0)
    tl.store(out + line * DIM + column, result, mask=column < DIM)


@triton.jit(do_not_specialize=["spans", "window"])
def prefill(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    offsets: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    spans: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    table_row: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Rows of several tokens over their prefix and themselves.

    Program (block, kv head) computes TOKENS tokens of one span, their heads one under another
    in LINES lines. A span of n tokens has at most n // TOKENS + 1 blocks; those before span s
    number offsets[s] // TOKENS + s at least, so the blocks are told apart without a list.

    Args:
        query: from the first span's first token on; `out` too, [tokens, heads, DIM].
        table: pages of each span, prefix and own tokens, [spans, table_row].
        offsets: index of each span's first token, and the end of the last.
        starts: position of each span's first token.
        window: positions a token sees.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    span, after = 0, spans
    while after - span > 1:
        middle = (span + after) // 2
        earlier = tl.load(offsets + middle) // TOKENS + middle <= block
        span = tl.where(earlier, middle, span)
        after = tl.where(earlier, after, middle)
    begin = tl.load(offsets + span)
    length = tl.load(offsets + span + 1) - begin
    local = (block - begin // TOKENS - span) * TOKENS
    if local >= length:
        return
    start = tl.load(starts + span)
    line, column = tl.arange(0, LINES), tl.arange(0, DIM_PAD)
    token = local + line // GROUP
    index = head * GROUP + line % GROUP
    wanted = (line < TOKENS * GROUP) & (token < length)
    inside = wanted[:, None] & (column < DIM)[None, :]
    row = (begin + token).to(tl.int64)
    asked = tl.load(
        query + (row * query_row + index * query_head)[:, None] + column[None, :],
        mask=inside,
        other=0.0,
    )
    position = start + token
    total = tl.zeros([LINES, DIM_PAD], dtype=tl.float32)
    most = tl.full([LINES], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([LINES], dtype=tl.float32)
    # Tiles that every token of the block sees whole come first: they need no mask.
    end = start + tl.minimum(local + TOKENS, length)
    low = 0
    plain = (start + local + 1) // TILE * TILE
    if HAS_WINDOW:
        low = tl.maximum(start + local + 1 - window, 0) // TILE * TILE
        plain = low
    for masked in tl.static_range(2):
        total, most, weight = _sweep(
            (total, most, weight),
            asked,
            keys + head * DIM,
            values + head * DIM,
            table + span * table_row,
            plain if masked else low,
            end if masked else plain,
            end,
            wanted,
            position,
            window,
            scale,
            softcap,
            KV_HEADS * DIM,
            DIM,
            DIM_PAD,
            PAGE_SIZE,
            TILE,
            masked,
            HAS_WINDOW,
            HAS_SOFTCAP,
            WIDE,
        )
    result = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
    place = (row * KV_HEADS * GROUP + index) * DIM
    tl.store(out + place[:, None] + column[None, :], result, mask=inside)
