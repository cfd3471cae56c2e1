"""Bounded execution: order, limits, errors, early ends and memory."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING

import pytest

from asyncsgl.batch.executor import Outcome, bounded
from asyncsgl.errors import BatchError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator

pytestmark = pytest.mark.anyio


async def double(row: int) -> int:
    await asyncio.sleep(0)
    return 2 * row


def other_tasks() -> set[asyncio.Task[object]]:
    """The unfinished tasks, without this one and the test runner's own."""
    return {
        task
        for task in asyncio.all_tasks() - {asyncio.current_task()}
        if "_call_in_runner_task" not in repr(task.get_coro())
    }


class Gate:
    """Work that waits until it is let through, and counts."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.entered = 0
        self.now = 0
        self.most = 0
        self.cancelled = 0

    async def __call__(self, row: int) -> int:
        self.entered += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.opened.wait()
            await settle(10)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        return row


async def settle(turns: int = 200) -> None:
    """Let every task go on as far as it can without new events."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def test_every_row_has_one_outcome() -> None:
    outcomes = [o async for o in bounded(double, range(100), concurrency=7)]
    assert sorted((o.index, o.row, o.result()) for o in outcomes) == [
        (i, i, 2 * i) for i in range(100)
    ]


async def test_no_rows() -> None:
    rows: list[int] = []
    assert [o async for o in bounded(double, rows, concurrency=3)] == []


async def test_rows_may_be_asynchronous_and_are_closed() -> None:
    closed = False

    async def rows() -> AsyncGenerator[int, None]:
        nonlocal closed
        try:
            for i in range(20):
                await asyncio.sleep(0)
                yield i
        finally:
            closed = True

    outcomes = [o async for o in bounded(double, rows(), concurrency=3)]
    assert sorted(o.result() for o in outcomes) == list(range(0, 40, 2))
    assert closed


@pytest.mark.parametrize("concurrency", [1, 2, 5])
async def test_never_more_than_concurrency_at_once(concurrency: int) -> None:
    gate = Gate()
    gate.opened.set()
    outcomes = [o async for o in bounded(gate, range(50), concurrency=concurrency)]
    assert len(outcomes) == 50
    assert gate.most == concurrency


async def test_rows_are_pulled_only_when_there_is_room() -> None:
    pulled = 0

    def rows() -> Iterator[int]:
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled

    gate = Gate()
    async with aclosing(bounded(gate, rows(), concurrency=4)) as outcomes:
        first = asyncio.ensure_future(anext(outcomes))
        await settle()
        assert (pulled, gate.entered) == (4, 4)
        assert len(other_tasks()) == 6  # the four, their owner, and ``first``
        gate.opened.set()
        await first


async def test_a_slow_consumer_slows_the_work() -> None:
    gate = Gate()
    gate.opened.set()
    async with aclosing(bounded(gate, range(10_000), concurrency=4)) as outcomes:
        await anext(outcomes)
        await settle()
        assert gate.entered == 8
        for _ in range(10):
            await anext(outcomes)
        await settle()
        assert gate.entered == 18


async def test_ordered_by_index_and_bounded_behind_a_slow_row() -> None:
    first = asyncio.Event()
    entered = 0

    async def work(row: int) -> int:
        nonlocal entered
        entered += 1
        if row == 0:
            await first.wait()
        return row

    async with aclosing(bounded(work, range(1000), concurrency=3, ordered=True)) as outcomes:
        head = asyncio.ensure_future(anext(outcomes))
        await settle(500)
        assert entered == 24
        first.set()
        assert (await head).index == 0
        assert [o.index async for o in outcomes] == list(range(1, 1000))


async def test_an_exception_is_the_error_of_its_row_alone() -> None:
    async def work(row: int) -> int:
        await asyncio.sleep(0)
        return 10 // row

    outcomes = {o.index: o async for o in bounded(work, [1, 0, 5, 0], concurrency=2)}
    assert [outcomes[i].error is None for i in range(4)] == [True, False, True, False]
    assert outcomes[2].result() == 2
    with pytest.raises(ZeroDivisionError):
        outcomes[1].result()


async def test_a_cancellation_from_within_is_an_error_and_loses_no_row() -> None:
    async def work(row: int) -> int:
        if row == 1:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        return row

    outcomes = {o.index: o async for o in bounded(work, range(4), concurrency=2)}
    assert len(outcomes) == 4
    assert isinstance(outcomes[1].error, BatchError)
    assert isinstance(outcomes[1].error.__cause__, asyncio.CancelledError)


async def test_an_error_of_the_rows_comes_after_the_outcomes_before_it() -> None:
    def rows() -> Iterator[int]:
        yield from range(5)
        raise OSError("disk gone")

    seen: list[int] = []

    async def consume() -> None:
        async for outcome in bounded(double, rows(), concurrency=3):
            seen.append(outcome.index)  # noqa: PERF401 - kept when the loop raises

    with pytest.raises(OSError, match="disk gone"):
        await consume()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert not other_tasks()


async def test_closing_cancels_the_work_and_leaves_no_task() -> None:
    closed = False

    def rows() -> Generator[int]:
        nonlocal closed
        try:
            yield from range(1000)
        finally:
            closed = True

    gate = Gate()

    async def work(row: int) -> int:
        return row if row == 0 else await gate(row)

    outcomes = bounded(work, rows(), concurrency=4)
    assert (await anext(outcomes)).index == 0
    await settle()
    assert gate.entered == 4
    await outcomes.aclose()
    assert gate.cancelled == gate.entered
    assert closed
    assert not other_tasks()


async def test_leaving_the_loop_early_inside_aclosing() -> None:
    gate = Gate()
    gate.opened.set()
    async with aclosing(bounded(gate, range(1000), concurrency=4)) as outcomes:
        async for outcome in outcomes:
            if outcome.index >= 10:
                break
    assert gate.now == 0
    assert not other_tasks()


async def test_work_that_cleans_up_is_waited_for() -> None:
    cleaned = 0
    entered = asyncio.Event()

    async def work(_row: int) -> None:
        nonlocal cleaned
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(50):
                await asyncio.sleep(0)
            cleaned += 1

    consumer = asyncio.ensure_future(anext(bounded(work, range(2), concurrency=2)))
    await entered.wait()
    await settle()
    consumer.cancel()
    for _ in range(5):  # impatience does not make it leave tasks behind
        await asyncio.sleep(0)
        consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert cleaned == 2
    assert not other_tasks()


async def test_cancelling_the_consumer_cancels_the_work() -> None:
    gate = Gate()

    async def consume() -> None:
        async for _ in bounded(gate, range(100), concurrency=3):
            pass

    consumer = asyncio.ensure_future(consume())
    await settle()
    assert gate.entered == 3
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert gate.cancelled == 3
    assert not other_tasks()


async def test_a_dropped_generator_cleans_up() -> None:
    gate = Gate()

    async def work(row: int) -> int:
        return row if row == 0 else await gate(row)

    async for _ in bounded(work, range(100), concurrency=3):
        break
    gc.collect()
    await settle()
    assert gate.cancelled == gate.entered > 0
    assert not other_tasks()


async def test_a_generator_that_was_never_started_has_no_tasks() -> None:
    bounded(double, range(10), concurrency=3)
    await settle()
    assert not other_tasks()


async def test_the_generator_may_be_advanced_and_closed_by_different_tasks() -> None:
    outcomes = bounded(double, range(100), concurrency=3)
    for _ in range(5):
        await asyncio.create_task(_next(outcomes))
    await asyncio.create_task(outcomes.aclose())
    assert not other_tasks()


async def _next(outcomes: AsyncGenerator[Outcome[int, int], None]) -> Outcome[int, int]:
    return await anext(outcomes)


async def test_each_row_has_its_own_context() -> None:
    seen: ContextVar[int] = ContextVar("seen", default=-1)

    async def work(row: int) -> int:
        before = seen.get()
        seen.set(row)
        await asyncio.sleep(0)
        return before

    outcomes = [o.result() async for o in bounded(work, range(20), concurrency=2)]
    assert set(outcomes) == {-1}


async def test_the_observer_sees_each_start_and_end() -> None:
    class Observer:
        def __init__(self) -> None:
            self.begun: list[int] = []
            self.ended: dict[int, bool] = {}

        def started(self, index: int, row: object) -> None:
            assert row == index - 1
            self.begun.append(index)

        def finished(self, outcome: Outcome[object, object]) -> None:
            assert outcome.index in self.begun
            self.ended[outcome.index] = outcome.error is None

    async def work(row: int) -> float:
        return 1 / row

    observer = Observer()
    async for _ in bounded(work, range(-1, 9), concurrency=3, observer=observer):
        pass
    assert observer.begun == list(range(10))
    assert observer.ended == {i: i != 1 for i in range(10)}


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5, "4"])
async def test_a_bad_concurrency_is_refused_at_the_call(concurrency: object) -> None:
    with pytest.raises(InvalidArgument, match="concurrency"):
        bounded(double, [1], concurrency=concurrency)  # type: ignore[arg-type]


async def test_rows_that_are_no_rows_are_refused_at_the_call() -> None:
    with pytest.raises(InvalidArgument, match="rows"):
        bounded(double, 5, concurrency=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("ordered", [False, True])
async def test_memory_is_flat(ordered: bool) -> None:
    async def work(row: int) -> bytes:
        return bytes(1000)

    async def peak_of(rows: int) -> int:
        tracemalloc.start()
        try:
            async for _ in bounded(work, iter(range(rows)), concurrency=8, ordered=ordered):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    await peak_of(500)  # first-use allocations
    small, large = await peak_of(500), await peak_of(10_000)
    assert large < small + 100_000  # holding 9,500 more results would be 9.5 MB
