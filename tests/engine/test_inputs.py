"""Plans as flat tensors, for attention that reads slots and for attention that reads pages."""

from __future__ import annotations

import torch

from asyncsgl_engine.inputs import Batch, InputBuilder
from asyncsgl_engine.plan import Plan, Row

CPU = torch.device("cpu")
PLAN = Plan(
    (
        Row(0, [11], 4, [7, 9], 0, 1, (), sample=True),
        Row(2, [12], 0, [5], 0, 1, (), sample=True),
        Row(1, [13, 14, 15], 3, [2, 8], 0, 3, (), sample=False),
        Row(3, [16, 17], 0, [1], 0, 0, [17, 18], sample=True),
    )
)


def build(needs_slots: bool, needs_tables: bool) -> Batch:
    return InputBuilder(4, 4, 6, needs_slots, CPU, needs_tables).build(PLAN)


def test_tokens_go_to_the_slots_of_their_positions() -> None:
    for needs_tables in (False, True):
        batch = build(needs_slots=False, needs_tables=needs_tables)
        assert batch.input_ids.tolist() == [[11, 12, 13, 14, 15, 16, 17]]
        assert batch.position_ids.tolist() == [[4, 0, 3, 4, 5, 0, 1]]
        assert batch.write_slots.tolist() == [36, 20, 11, 32, 33, 4, 5]
        assert batch.single_lengths.tolist() == [5, 1]
        assert batch.page_table.tolist() == [[7, 9], [5, 0]]
        # Drawn first, in row order; then scored.
        assert batch.logit_rows.tolist() == [0, 1, 6, 5, 6]


def test_slots_of_whole_contexts() -> None:
    batch = build(needs_slots=True, needs_tables=False)
    assert batch.single_slots is not None
    # Past a row's length stands a slot that holds something.
    assert batch.single_slots.tolist() == [[28, 29, 30, 31, 36], [20, 20, 20, 20, 20]]
    slots = [span.slots.tolist() for span in batch.spans if span.slots is not None]
    assert slots == [[8, 9, 10, 11, 32, 33], [4, 5]]
    assert batch.span_tables is None


def test_page_tables_of_spans() -> None:
    batch = build(needs_slots=False, needs_tables=True)
    tables = batch.span_tables
    assert tables is not None
    assert tables.offsets.tolist() == [0, 3, 5]
    assert tables.starts.tolist() == [3, 0]
    assert tables.pages.tolist() == [[2, 8], [1, 0]]
    assert [(span.begin, span.length, span.slots) for span in batch.spans] == [
        (2, 3, None),
        (5, 2, None),
    ]
    assert batch.single_slots is None
