"""Runs one piece of work for each of many rows, a bounded number of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Generator,
    Iterable,
)
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

from ..errors import BatchError, InvalidArgument
from .waiting import ended

__all__ = ["BatchObserver", "Outcome", "bounded"]

Row = TypeVar("Row")
T = TypeVar("T")
Row_co = TypeVar("Row_co", covariant=True)
T_co = TypeVar("T_co", covariant=True)

# Rows taken and not yet handed out, for each row at work. In order, a slow row holds back the
# rows after it, so more of them may wait before the work has to pause.
_WINDOW = 2
_WINDOW_ORDERED = 8


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Row_co, T_co]):
    """How one row ended.

    Args:
        index: the row's position, from 0.
        row: the row itself.
        value: what the work returned; ``None`` after an error.
        error: what the work raised; ``None`` if it returned.
    """

    index: int
    row: Row_co
    value: T_co | None = None
    error: Exception | None = None

    def result(self) -> T_co:
        """The value.

        Raises:
            Exception: the error, if the row failed.
        """
        if self.error is not None:
            raise self.error
        return cast("T_co", self.value)


class BatchObserver(Protocol):
    """Is told, on the event loop and at once, what happens to each row."""

    def started(self, index: int, row: object) -> None:
        """The work on a row begins."""

    def finished(self, outcome: Outcome[object, object]) -> None:
        """The work on a row has ended, well or not."""


def bounded(
    work: Callable[[Row], Awaitable[T]],
    rows: Iterable[Row] | AsyncIterable[Row],
    *,
    concurrency: int,
    ordered: bool = False,
    observer: BatchObserver | None = None,
) -> AsyncGenerator[Outcome[Row, T], None]:
    """Run ``work`` for every row and give the outcomes as they come.

    Rows are pulled one at a time, when there is room to work on them, and each runs in a task
    and a context of its own. At most ``concurrency`` rows are at work and at most twice as
    many (eight times, if ``ordered``) are held at all, so memory stays flat however many rows
    there are, and a consumer that is slow to take the outcomes slows the work down.

    An ``Exception`` that the work raises becomes the outcome's ``error`` and hurts no other
    row. An exception of ``rows`` itself is raised to the consumer after the outcomes of all
    rows pulled before it. Closing the generator, cancelling its consumer or dropping it
    cancels all work; when closing returns, no task is left. Use it in
    :func:`contextlib.aclosing` where the loop over it may be left early.

    Args:
        work: is awaited with each row.
        rows: any number of rows. A plain iterable is read on the event loop, so it must not
            block; an iterable that reads files or sockets should be asynchronous. A generator
            is closed at the end.
        concurrency: rows at work at once, 1 or more.
        ordered: give the outcomes in the order of the rows, not in the order they finish.
        observer: is told of each start and end.

    Returns:
        A generator of one outcome for each row.

    Raises:
        InvalidArgument: ``concurrency`` is not a whole number above 0, or ``rows`` is not
            iterable.
    """
    _check(concurrency, rows)
    window = concurrency * (_WINDOW_ORDERED if ordered else _WINDOW)
    return _Run(work, rows, concurrency, window, observer).outcomes(ordered=ordered)


def _check(concurrency: object, rows: object) -> None:
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise InvalidArgument("concurrency", f"must be a whole number above 0, got {concurrency!r}")
    if not isinstance(rows, (Iterable, AsyncIterable)):
        raise InvalidArgument("rows", f"must be iterable, got {type(rows).__name__}")


class _Run(Generic[Row, T]):
    """The tasks of one batch and what passes between them and the consumer.

    The task group lives in a task of its own, never in the generator's frame: a generator
    may be advanced and closed by different tasks, and a task group may not.
    """

    def __init__(
        self,
        work: Callable[[Row], Awaitable[T]],
        rows: Iterable[Row] | AsyncIterable[Row],
        concurrency: int,
        window: int,
        observer: BatchObserver | None,
    ) -> None:
        self._work = work
        self._rows = rows
        self._observer = observer
        self._at_work = asyncio.Semaphore(concurrency)
        self._held = asyncio.Semaphore(window)
        self._done: asyncio.Queue[Outcome[Row, T] | None] = asyncio.Queue()

    async def outcomes(self, *, ordered: bool) -> AsyncGenerator[Outcome[Row, T], None]:
        owner = asyncio.create_task(self._run_all(), name="asyncsgl-batch")
        waiting: dict[int, Outcome[Row, T]] = {}
        due = 0
        try:
            while (outcome := await self._done.get()) is not None:
                waiting[outcome.index] = outcome
                if not ordered:
                    due = outcome.index
                while due in waiting:
                    yield waiting.pop(due)
                    self._held.release()
                    due += 1
            await owner
        finally:
            owner.cancel()
            await ended(owner)

    async def _run_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                failure = await self._feed(group)
        finally:
            self._done.put_nowait(None)
        if failure is not None:
            raise failure

    async def _feed(self, group: asyncio.TaskGroup) -> Exception | None:
        """Start the work of each row; the exception that ended the rows, if one did."""
        async with aclosing(_stream(self._rows)) as source:
            index = 0
            while True:
                await self._held.acquire()
                await self._at_work.acquire()
                try:
                    row = await anext(source)
                except StopAsyncIteration:
                    return None
                except Exception as error:  # noqa: BLE001 - raised once the others have ended
                    return error
                group.create_task(self._work_on(index, row))
                index += 1

    async def _work_on(self, index: int, row: Row) -> None:
        if self._observer is not None:
            self._observer.started(index, row)
        outcome: Outcome[Row, T]
        try:
            value = await self._work(row)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            outcome = Outcome(index, row, error=_cancelled_within(error))
        except Exception as error:  # noqa: BLE001 - the outcome carries it
            outcome = Outcome(index, row, error=error)
        else:
            outcome = Outcome(index, row, value=value)
        self._at_work.release()
        if self._observer is not None:
            self._observer.finished(outcome)
        self._done.put_nowait(outcome)


async def _stream(rows: Iterable[Row] | AsyncIterable[Row]) -> AsyncGenerator[Row, None]:
    """The rows one by one, with a turn for other tasks after each."""
    if isinstance(rows, AsyncIterable):
        source = aiter(rows)
        try:
            async for row in source:
                yield row
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()
        return
    plain = iter(rows)
    try:
        for row in plain:
            yield row
            await asyncio.sleep(0)
    finally:
        if isinstance(plain, Generator):
            plain.close()


def _is_cancelled() -> bool:
    """Whether somebody cancelled the current task, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cancelled_within(cause: asyncio.CancelledError) -> BatchError:
    error = BatchError("the work of this row was cancelled from within")
    error.__cause__ = cause
    return error
