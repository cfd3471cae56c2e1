"""A run that is watched while it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

from ..errors import ClosedError, UnknownVariable
from .events import Event, Listener, Text, VariableFailed, VariableFinished
from .result import State

__all__ = ["ProgramStream"]


class _History:
    """The events so far. Any number of readers follow at their own pace.

    Text that no reader has come to yet grows in place, so that a slow reader costs the
    memory of the text and not of its pieces.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = False
        self._furthest = 0
        self._wake: asyncio.Event = asyncio.Event()

    def on(self, event: Event) -> None:
        """Take one event."""
        last = len(self.events) - 1
        if last >= self._furthest and (merged := _merged(self.events[last], event)) is not None:
            self.events[last] = merged
        else:
            self.events.append(event)
        self._signal()

    def end(self) -> None:
        """No more events will come."""
        self.ended = True
        self._signal()

    def _signal(self) -> None:
        self._wake.set()

    async def read(self) -> AsyncGenerator[Event, None]:
        """All events from the first on, until the end."""
        position = 0
        while True:
            while position < len(self.events):
                event = self.events[position]
                position += 1
                self._furthest = max(self._furthest, position)
                yield event
            if self.ended:
                return
            self._wake.clear()
            await self._wake.wait()


def _merged(last: Event, event: Event) -> Event | None:
    """One text event in place of two of the same variable; None where that is not so."""
    if not isinstance(last, Text) or not isinstance(event, Text):
        return None
    if (last.branch, last.name, last.index) != (event.branch, event.name, event.index):
        return None
    return Text(
        last.branch, last.name, last.text + event.text, last.index, last.logprobs + event.logprobs
    )


class ProgramStream:
    """A run and its events, used as ``async with prog.stream(…) as run``.

    Iterate over it for all events, or over :meth:`text` for the pieces of one variable. The
    run starts on entering; leaving early cancels what is left of it.
    """

    def __init__(self, start: Callable[[Sequence[Listener]], Coroutine[Any, Any, State]]) -> None:
        self._start = start
        self._history = _History()
        self._task: asyncio.Task[State] | None = None

    async def __aenter__(self) -> Self:
        if self._task is not None:
            raise ClosedError("this stream was entered before: call stream() again")
        self._task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> State:
        try:
            return await self._start([self._history])
        finally:
            self._history.end()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        task = self._require()
        task.cancel()
        await asyncio.wait([task])
        if exc_type is None and not task.cancelled():
            task.exception()  # marks it as seen: whoever wants it asks for the result

    def _require(self) -> asyncio.Task[State]:
        if self._task is None:
            raise ClosedError("enter the stream first: async with prog.stream(...) as run")
        return self._task

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        """All events of the run; at their end, the run's error is raised if it failed."""
        self._require()
        async for event in self._history.read():
            yield event
        await self.result()

    async def text(
        self, name: str | None = None, *, branch: tuple[int, ...] = (), index: int = 0
    ) -> AsyncGenerator[str, None]:
        """The pieces of the variable ``name``; their concatenation is its text.

        Args:
            name: the variable; None for all text of the branch, the program's own included.
            branch: the path of a fork's branch; the main one unless given.
            index: which of the ``n`` answers.

        Raises:
            Exception: the error of the run, when it fails before the variable is done.
            UnknownVariable: the run ended without this variable.
        """
        self._require()
        async for event in self._history.read():
            match event:
                case Text() if event.branch == branch and name in (None, event.name):
                    if event.index == index:
                        yield event.text
                case VariableFinished() if name is not None and event.name == name:
                    if event.branch == branch:
                        return
                case VariableFailed() if name is not None and event.name == name:
                    if event.branch == branch:
                        break
                case _:
                    pass
        state = await self.result()
        if name is not None and not branch and name not in state:
            raise UnknownVariable(name, state)

    async def result(self) -> State:
        """The finished state.

        Raises:
            Exception: the run's error.
        """
        return await asyncio.shield(self._require())
