"""Turns a plan into the flat tensors of one packed forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from .errors import InternalError
from .plan import Plan, Row
from .transfer import upload_all

__all__ = ["Batch", "InputBuilder", "Inserts", "Span", "SpanTables"]

Array = npt.NDArray[np.generic]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """A row of several tokens.

    Args:
        begin: index of its first token in the step.
        length: tokens it computes.
        start: position of the first; so many positions are in the cache already.
        slots: cache slots of positions 0 to start + length - 1, int64 (start + length,); None
            where attention reads page tables.
    """

    begin: int
    length: int
    start: int
    slots: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class SpanTables:
    """The S spans of a step as kernels read them.

    Args:
        offsets: of each span's first token among the spans' tokens, and the number of those,
            int32 (S + 1,).
        starts: position of each span's first token, int32 (S,).
        pages: page ids of each span, those of its own tokens included, int32 (S, pages).
    """

    offsets: torch.Tensor
    starts: torch.Tensor
    pages: torch.Tensor


@dataclass(frozen=True, slots=True)
class Inserts:
    """What some tokens of a step have instead of their own embeddings.

    Args:
        rows: which tokens, int64 (M,).
        values: their embeddings, (M, hidden).
    """

    rows: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed step of T tokens: D rows of one token, then spans.

    Args:
        input_ids: int64 (1, T).
        position_ids: int64 (1, T).
        write_slots: cache slot of each token, int64 (T,).
        singles: D.
        single_slots: cache slots of each single row's context, int64 (D, longest); positions
            past a row's length point to its first slot.
        single_lengths: context length of each, its own token included, int64 (D,).
        page_table: page ids of each single row, int32 (D, pages).
        longest_single: the longest of `single_lengths`, or more.
        spans: rows of several tokens.
        span_tables: the same for kernels, where attention reads page tables.
        logit_rows: tokens whose logits are needed, int64 (R,): first those that a token is
            drawn after, in row order, then those that are scored.
        inserts: images that the step reads, or None.
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
    span_tables: SpanTables | None = None
    inserts: Inserts | None = None

    def embedded(self, look_up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What the model reads for every token.

        Args:
            look_up: from token ids, (T,), to their own embeddings, (T, hidden).

        Returns:
            (T, hidden).
        """
        own = look_up(self.input_ids[0])
        if self.inserts is None:
            return own
        return own.index_copy(0, self.inserts.rows, self.inserts.values.to(own.dtype))


class InputBuilder:
    """Keeps each slot's page table and flattens plans.

    Args:
        slots: `max_running_requests`.
        page_size: tokens in a page.
        most_pages: pages of the longest sequence.
        needs_slots: whether attention reads token slots of single rows instead of page tables.
        device: where the tensors go.
        needs_tables: whether attention reads page tables of spans instead of token slots.
    """

    def __init__(
        self,
        slots: int,
        page_size: int,
        most_pages: int,
        needs_slots: bool,
        device: torch.device,
        needs_tables: bool = False,
    ) -> None:
        self._page_size = page_size
        self._tables = np.zeros((slots, most_pages), dtype=np.int32)
        self._offsets = np.arange(page_size, dtype=np.int64)
        self._needs_slots = needs_slots
        self._needs_tables = needs_tables
        self._device = device

    def build(
        self, plan: Plan, inserts: Inserts | None = None, drawn: torch.Tensor | None = None
    ) -> Batch:
        """Flatten a plan.

        Args:
            plan: its rows of one token first.
            inserts: what of it are images.
            drawn: the token last drawn in each slot, int64 (slots,), on the device; read where
                the plan says `DRAWN`.
        """
        self._note_pages(plan)
        single = [row for row in plan.rows if len(row.tokens) == 1]
        many = plan.rows[len(single) :]
        table, lengths = self._singles(single)
        tokens = np.fromiter(
            (token for row in plan.rows for token in row.tokens), np.int64, plan.num_tokens
        )
        whole, own = self._token_slots(many)
        flat = (
            tokens[None],
            self._positions(single, many)[None],
            np.concatenate([self._single_write_slots(single), *own]),
            lengths,
            table,
            _logit_rows(plan),
        )
        late = _late(tokens, single)
        wants_slots = self._needs_slots and bool(single)
        contexts = [self._contexts(table, lengths)] if wants_slots else []
        extra: Sequence[Array] = whole
        if self._needs_tables:
            extra = self._span_arrays(many) if many else []
        # All in one transfer.
        parts = iter(upload_all([*flat, *late, *contexts, *extra], self._device))
        ids, positions, write_slots, single_lengths, page_table, logit_rows = islice(parts, 6)
        if late:
            _fill_in(ids[0], next(parts), next(parts), drawn)
        single_slots = next(parts) if wants_slots else None
        extras = list(parts)
        return Batch(
            input_ids=ids,
            position_ids=positions,
            write_slots=write_slots,
            singles=len(single),
            single_slots=single_slots,
            single_lengths=single_lengths,
            page_table=page_table,
            longest_single=int(lengths.max(initial=0)),
            spans=_spans(many, len(single), None if self._needs_tables else extras),
            logit_rows=logit_rows,
            span_tables=SpanTables(*extras) if self._needs_tables and many else None,
            inserts=inserts,
        )

    def _note_pages(self, plan: Plan) -> None:
        """Bring the slots' page tables up to date."""
        for row in plan.rows:
            pages = row.pages
            if row.fresh_from < len(pages):
                self._tables[row.slot, row.fresh_from : len(pages)] = pages[row.fresh_from :]

    def _token_slots(self, many: tuple[Row, ...]) -> tuple[list[Ints], list[Ints]]:
        """Token slots that each row reads, unless it reads page tables, and those it writes."""
        prefixes = [0 if self._needs_tables else row.start for row in many]
        whole = [self._slots_of(row, prefix) for row, prefix in zip(many, prefixes, strict=True)]
        return whole, [slots[prefix:] for slots, prefix in zip(whole, prefixes, strict=True)]

    def _positions(self, single: list[Row], many: tuple[Row, ...]) -> Ints:
        parts = [np.fromiter((row.start for row in single), np.int64, len(single))]
        parts += [np.arange(row.start, row.start + len(row.tokens)) for row in many]
        return np.concatenate(parts)

    def _slots_of(self, row: Row, prefix: int) -> Ints:
        """Slots of a row's tokens and of so many before them."""
        size = self._page_size
        begin, end = row.start - prefix, row.start + len(row.tokens)
        pages = self._tables[row.slot, begin // size : -(-end // size)].astype(np.int64)
        slots: Ints = (pages[:, None] * size + self._offsets).reshape(-1)
        return slots[begin % size : begin % size + end - begin]

    def _table_of(self, rows: Sequence[Row], longest: int) -> npt.NDArray[np.int32]:
        seats = np.fromiter((row.slot for row in rows), np.int64, len(rows))
        return self._tables[seats, : -(-longest // self._page_size)]

    def _span_arrays(self, many: tuple[Row, ...]) -> list[Array]:
        starts = np.array([row.start for row in many], dtype=np.int32)
        lengths = np.array([len(row.tokens) for row in many], dtype=np.int32)
        offsets = np.zeros(len(many) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return [offsets, starts, self._table_of(many, int((starts + lengths).max()))]

    def _singles(self, single: list[Row]) -> tuple[npt.NDArray[np.int32], Ints]:
        lengths = np.fromiter((row.start + 1 for row in single), np.int64, len(single))
        return self._table_of(single, int(lengths.max(initial=0))), lengths

    def _contexts(self, table: npt.NDArray[np.int32], lengths: Ints) -> Ints:
        longest = int(lengths.max())
        whole = table.astype(np.int64)[:, :, None] * self._page_size + self._offsets
        context = np.ascontiguousarray(whole.reshape(len(table), -1)[:, :longest])
        # Only what was written may be read: a masked position's weight is 0, and 0 * nan is nan.
        np.copyto(context, context[:, :1], where=np.arange(longest) >= lengths[:, None])
        return context

    def _single_write_slots(self, single: list[Row]) -> Ints:
        size = self._page_size
        return np.fromiter(
            (row.pages[row.start // size] * size + row.start % size for row in single),
            np.int64,
            len(single),
        )


def _late(tokens: Ints, single: Sequence[Row]) -> list[Ints]:
    """Where tokens stand that only the device knows, and the slots they were drawn in."""
    unknown = np.flatnonzero(tokens[: len(single)] < 0)
    if not len(unknown):
        return []
    return [unknown, np.array([single[index].slot for index in unknown.tolist()], dtype=np.int64)]


def _fill_in(
    ids: torch.Tensor, where: torch.Tensor, slots: torch.Tensor, drawn: torch.Tensor | None
) -> None:
    """Put in the tokens that were last drawn in some slots."""
    if drawn is None:
        raise InternalError("a plan asks for drawn tokens, and there are none")
    ids.index_copy_(0, where, drawn.index_select(0, slots))


def _spans(
    many: tuple[Row, ...], begin: int, slots: Sequence[torch.Tensor] | None
) -> tuple[Span, ...]:
    spans = []
    for index, row in enumerate(many):
        own = None if slots is None else slots[index]
        spans.append(Span(begin, len(row.tokens), row.start, own))
        begin += len(row.tokens)
    return tuple(spans)


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
