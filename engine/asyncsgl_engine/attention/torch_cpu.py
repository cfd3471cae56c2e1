"""Paged attention from PyTorch's own operators: the implementation that runs anywhere."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..inputs import Span
from .base import LayerCall, StepContext

__all__ = ["TorchAttention", "attend_spans", "write"]


class TorchAttention:
    """Gathers each context from its pages and lets scaled_dot_product_attention do the rest."""

    needs_slots = True
    needs_tables = False
    skips_padding = False

    def attend(self, call: LayerCall, context: StepContext) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        write(call, context)
        out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
        if context.batch.singles:
            _attend_singles(call, context, out)
        attend_spans(call, context, out)
        return out


def write(call: LayerCall, context: StepContext) -> None:
    """Put a step's keys and values into the cache."""
    slots = context.batch.write_slots
    context.cache.keys[call.layer].index_copy_(0, slots, call.key)
    context.cache.values[call.layer].index_copy_(0, slots, call.value)


def attend_spans(call: LayerCall, context: StepContext, out: torch.Tensor) -> None:
    """Attend the rows of several tokens, each on its own."""
    for index, span in enumerate(context.batch.spans):
        rows = slice(span.begin, span.begin + span.length)
        query = call.query[rows].transpose(0, 1)  # [heads, length, head_dim]
        plain = call.window is None and call.softcap is None
        if span.start == 0 and plain:
            key, value, mask = call.key[rows], call.value[rows], None
        else:
            if span.slots is None:
                raise ValueError("the batch was built without the spans' token slots")
            key = context.cache.keys[call.layer].index_select(0, span.slots)
            value = context.cache.values[call.layer].index_select(0, span.slots)
            mask = _span_mask(span, index, call, context)
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        out[rows] = _attend(query[None], key[None], value[None], mask, call)[0].transpose(0, 1)


def _attend_singles(call: LayerCall, context: StepContext, out: torch.Tensor) -> None:
    batch = context.batch
    if batch.single_slots is None:
        raise ValueError("the batch was built without token slots")
    count, longest = batch.single_slots.shape
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    shape = (count, longest, kv_heads, call.query.shape[2])
    slots = batch.single_slots.view(-1)
    key = context.cache.keys[call.layer].index_select(0, slots).view(shape).transpose(1, 2)
    value = context.cache.values[call.layer].index_select(0, slots).view(shape).transpose(1, 2)
    # A group of query heads stands as so many query positions: no key is repeated.
    query = call.query[:count].view(count, kv_heads, heads // kv_heads, -1)
    mask = _single_mask(longest, call, context)
    attended = _attend(query, key, value, mask, call)
    out[:count] = attended.reshape(count, heads, -1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: LayerCall,
) -> torch.Tensor:
    """Query (B, H, L, E), key and value (B, KV, S, E); no mask means causal."""
    if call.softcap is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * call.scale
    scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value


def _single_mask(longest: int, call: LayerCall, context: StepContext) -> torch.Tensor:
    mask = context.masks.get((-1, call.window))
    if mask is None:
        lengths = context.batch.single_lengths[:, None]
        positions = torch.arange(longest, device=lengths.device)
        mask = positions < lengths
        if call.window is not None:
            mask &= positions >= lengths - call.window
        mask = mask[:, None, None, :]
        context.masks[-1, call.window] = mask
    return mask


def _span_mask(span: Span, index: int, call: LayerCall, context: StepContext) -> torch.Tensor:
    mask = context.masks.get((index, call.window))
    if mask is None:
        device = call.query.device
        rows = torch.arange(span.start, span.start + span.length, device=device)[:, None]
        columns = torch.arange(span.start + span.length, device=device)
        mask = columns <= rows
        if call.window is not None:
            mask &= columns > rows - call.window
        context.masks[index, call.window] = mask
    return mask
