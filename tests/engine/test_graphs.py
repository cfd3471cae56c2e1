"""Which graph a step takes, and how it is padded: everything but the capture itself."""

from __future__ import annotations

import logging

import pytest
import torch

from asyncsgl_engine.graphs import GraphedForward, Replay, StaticInputs, capture_all, ladder
from asyncsgl_engine.inputs import Batch, InputBuilder
from asyncsgl_engine.plan import Plan, Row

CPU = torch.device("cpu")


def batch_of(lengths: list[int], new: int = 1) -> Batch:
    rows = tuple(
        Row(slot, [slot + 5] * new, length - 1, [slot] * 8, 0, new, (), sample=True)
        for slot, length in enumerate(lengths)
    )
    return InputBuilder(64, 4, 8, False, CPU, True).build(Plan(rows))


def forward(batch: Batch) -> torch.Tensor:
    """Stands for a model: what it gives tells which inputs each row saw."""
    seen = torch.stack([batch.input_ids[0], batch.position_ids[0], batch.write_slots], dim=1)
    if batch.singles:
        pages = [batch.single_lengths, batch.page_table[:, 0].long()]
        seen = torch.cat([seen, torch.stack(pages, dim=1)], dim=1)
    return seen.index_select(0, batch.logit_rows)


def again(compute: Replay) -> Replay:
    kept = compute()

    def replay() -> torch.Tensor:
        kept.copy_(compute())
        return kept

    return replay


def graphed(sizes: tuple[int, ...]) -> GraphedForward:
    made = capture_all(forward, sizes, StaticInputs(max(sizes), 8, 4, CPU), again)
    assert made is not None
    return made


@pytest.mark.parametrize("most", [1, 3, 8, 20, 256, 400])
def test_the_ladder_ends_where_it_should_and_wastes_little(most: int) -> None:
    sizes = ladder(most)
    assert sizes == tuple(sorted(set(sizes)))
    assert (sizes[0], sizes[-1]) == (1, most)
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(8, rows / 2)


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    graphs = graphed((1, 2, 4))
    assert [graphs.size_for(batch_of([3] * rows)) for rows in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]
    several = batch_of([9], new=3)
    assert graphs.size_for(several) is None


@pytest.mark.parametrize(("lengths", "new"), [([9], 3), ([3] * 5, 1)])
def test_other_steps_go_without_a_graph(lengths: list[int], new: int) -> None:
    batch = batch_of(lengths, new)
    assert torch.equal(graphed((1, 2, 4)).forward(batch), forward(batch))


def test_rows_come_out_as_computed_alone_and_padding_has_no_context() -> None:
    graphs = graphed((1, 2, 4, 8))
    kept = []
    for lengths in ([9, 2, 30, 4, 5, 6, 7], [3], [31, 1, 8], [2, 2, 2, 2]):
        batch = batch_of(lengths)
        made = graphs.forward(batch)
        assert torch.equal(made, forward(batch))
        kept.append((made, made.clone()))
    assert all(torch.equal(made, copy) for made, copy in kept), "a replay overwrites no result"


def test_padding_writes_nowhere_and_attends_to_nothing() -> None:
    inputs = StaticInputs(4, 8, 4, CPU)
    inputs.load(batch_of([9, 2, 30, 4]), 4)
    inputs.load(batch_of([5]), 4)
    padded = inputs.view(4)
    assert padded.single_lengths.tolist() == [5, 0, 0, 0]
    assert padded.write_slots.tolist()[1:] == [-1, -1, -1]
    assert padded.longest_single == 32


def test_only_rows_that_want_logits_come_out() -> None:
    plan = Plan(
        (
            Row(0, [7], 4, [3, 4], 0, 1, (), sample=False),
            Row(1, [8], 5, [5, 6], 0, 1, (), sample=True),
        )
    )
    batch = InputBuilder(2, 4, 8, False, CPU, True).build(plan)
    made = graphed((2,)).forward(batch)
    assert made[:, 0].tolist() == [8]


def test_a_model_that_cannot_be_captured_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(compute: Replay) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        assert capture_all(forward, (1, 2), StaticInputs(2, 8, 4, CPU), refuse) is None
    assert "without CUDA graphs" in caplog.text
