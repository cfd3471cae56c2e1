"""Turns a plan into the flat tensors of one packed forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .plan import Plan, Row

__all__ = ["Batch", "InputBuilder", "Span"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """A row of several tokens.

    Args:
        begin: index of its first token in the step.
        length: tokens it computes.
        start: position of the first; so many positions are in the cache already.
        slots: cache slots of positions 0 to start + length - 1, int64 (start + length,).
    """

    begin: int
    length: int
    start: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed step of T tokens: D rows of one token, then spans.

    Args:
        input_ids: int64 (1, T).
        position_ids: int64 (1, T).
        write_slots: cache slot of each token, int64 (T,).
        singles: D.
        single_slots: cache slots of each single row's context, int64 (D, longest); positions
            past a row's length point to slot 0.
        single_lengths: context length of each, its own token included, int64 (D,).
        page_table: page ids of each single row, int32 (D, pages).
        spans: rows of several tokens.
        logit_rows: tokens whose logits are needed, int64 (R,): first those that a token is
            drawn after, in row order, then those that are scored.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    write_slots: torch.Tensor
    singles: int
    single_slots: torch.Tensor | None
    single_lengths: torch.Tensor
    page_table: torch.Tensor
    longest_single: int
    spans: tuple[Span, ...]
    logit_rows: torch.Tensor


class InputBuilder:
    """Keeps each slot's page table and flattens plans.

    Args:
        slots: `max_running_requests`.
        page_size: tokens in a page.
        most_pages: pages of the longest sequence.
        needs_slots: whether attention reads token slots instead of page tables.
        device: where the tensors go.
    """

    def __init__(
        self, slots: int, page_size: int, most_pages: int, needs_slots: bool, device: torch.device
    ) -> None:
        self._page_size = page_size
        self._tables = np.zeros((slots, most_pages), dtype=np.int32)
        self._offsets = np.arange(page_size, dtype=np.int64)
        self._needs_slots = needs_slots
        self._device = device

    def build(self, plan: Plan) -> Batch:
        """Flatten a plan."""
        for row in plan.rows:
            pages = row.pages
            if row.fresh_from < len(pages):
                self._tables[row.slot, row.fresh_from : len(pages)] = pages[row.fresh_from :]
        single = [row for row in plan.rows if len(row.tokens) == 1]
        many = plan.rows[len(single) :]
        positions = self._positions(single, many)
        slots, spans = self._spans(many, len(single))
        table, lengths, context = self._singles(single)
        own = self._single_write_slots(single)
        tokens = np.fromiter(
            (token for row in plan.rows for token in row.tokens), np.int64, plan.num_tokens
        )
        return Batch(
            input_ids=self._tensor(tokens).unsqueeze(0),
            position_ids=self._tensor(positions).unsqueeze(0),
            write_slots=self._tensor(np.concatenate([own, *slots])),
            singles=len(single),
            single_slots=None if context is None else self._tensor(context),
            single_lengths=self._tensor(lengths),
            page_table=torch.from_numpy(table).to(self._device),
            longest_single=int(lengths.max(initial=0)),
            spans=spans,
            logit_rows=self._tensor(_logit_rows(plan)),
        )

    def _tensor(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    def _positions(self, single: list[Row], many: tuple[Row, ...]) -> Ints:
        parts = [np.fromiter((row.start for row in single), np.int64, len(single))]
        parts += [np.arange(row.start, row.start + len(row.tokens)) for row in many]
        return np.concatenate(parts)

    def _slots_of(self, slot: int, count: int) -> Ints:
        pages = self._tables[slot, : -(-count // self._page_size)].astype(np.int64)
        whole: Ints = (pages[:, None] * self._page_size + self._offsets).reshape(-1)[:count]
        return whole

    def _spans(self, many: tuple[Row, ...], begin: int) -> tuple[list[Ints], tuple[Span, ...]]:
        slots, spans = [], []
        for row in many:
            length = len(row.tokens)
            whole = self._slots_of(row.slot, row.start + length)
            slots.append(whole[row.start :])
            spans.append(Span(begin, length, row.start, self._tensor(whole)))
            begin += length
        return slots, tuple(spans)

    def _singles(self, single: list[Row]) -> tuple[npt.NDArray[np.int32], Ints, Ints | None]:
        size = self._page_size
        lengths = np.fromiter((row.start + 1 for row in single), np.int64, len(single))
        longest = int(lengths.max(initial=0))
        seats = np.fromiter((row.slot for row in single), np.int64, len(single))
        table = self._tables[seats, : -(-longest // size)]
        if not (self._needs_slots and single):
            return table, lengths, None
        whole = (table.astype(np.int64)[:, :, None] * size + self._offsets).reshape(len(single), -1)
        context = np.ascontiguousarray(whole[:, :longest])
        context[np.arange(longest) >= lengths[:, None]] = 0
        return table, lengths, context

    def _single_write_slots(self, single: list[Row]) -> Ints:
        size = self._page_size
        return np.fromiter(
            (row.pages[row.start // size] * size + row.start % size for row in single),
            np.int64,
            len(single),
        )


def _logit_rows(plan: Plan) -> Ints:
    drawn: list[int] = []
    scored: list[int] = []
    begin = 0
    for row in plan.rows:
        if row.sample:
            drawn.append(begin + len(row.tokens) - 1)
        if row.targets:
            first = begin + row.score_from
            scored.extend(range(first, first + len(row.targets)))
        begin += len(row.tokens)
    return np.array(drawn + scored, dtype=np.int64)
