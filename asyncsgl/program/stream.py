"""A run that is watched while it goes on."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

from ..batch.waiting import ended
from ..errors import ClosedError, ProgramError, UnknownVariable
from ..types import TokenLogprob
from .events import Event, Listener, Path, Text, VariableFailed, VariableFinished
from .result import State

__all__ = ["ProgramStream"]


class _Growing:
    """Text of one variable that no reader has come to yet; it costs its length, not its pieces."""

    __slots__ = ("_logprobs", "_text", "first")

    def __init__(self, first: Text) -> None:
        self.first = first
        self._text = io.StringIO()
        self._logprobs: list[TokenLogprob] = []
        self.add(first)

    def takes(self, event: Event) -> bool:
        """Whether ``event`` is more text of the same answer."""
        first = self.first
        return (
            type(event) is Text
            and event.branch == first.branch
            and event.name == first.name
            and event.index == first.index
        )

    def add(self, event: Text) -> None:
        """Take more text."""
        self._text.write(event.text)
        self._logprobs.extend(event.logprobs)

    def event(self) -> Text:
        """All of it as one event."""
        first = self.first
        logprobs = tuple(self._logprobs)
        return Text(first.branch, first.name, self._text.getvalue(), first.index, logprobs)


class _History:
    """The events so far. Any number of readers follow at their own pace."""

    __slots__ = ("_ended", "_events", "_furthest", "_growing", "_wake")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._growing: _Growing | None = None
        self._furthest = 0
        self._ended = False
        self._wake = asyncio.Event()

    def on(self, event: Event) -> None:
        """Take one event."""
        if self._furthest == len(self._events):
            self._settle()
            self._events.append(event)
        elif self._growing is not None and self._growing.takes(event):
            assert isinstance(event, Text)
            self._growing.add(event)
        else:
            self._settle()
            self._events.append(event)
            self._growing = _Growing(event) if isinstance(event, Text) else None
        self._wake.set()

    def _settle(self) -> None:
        """Write down the text that was growing at the end."""
        if self._growing is not None:
            self._events[-1] = self._growing.event()
            self._growing = None

    def end(self) -> None:
        """No more events will come."""
        self._ended = True
        self._wake.set()

    async def at(self, position: int) -> Event | None:
        """The event at ``position``; None if the history ends before it."""
        while position >= len(self._events):
            if self._ended:
                return None
            self._wake.clear()
            await self._wake.wait()
        if position == len(self._events) - 1:
            self._settle()
        self._furthest = max(self._furthest, position + 1)
        return self._events[position]


class _Events:
    """All events of a run from the first on; at their end the run's error is raised."""

    __slots__ = ("_history", "_position", "_result")

    def __init__(self, history: _History, result: Callable[[], Coroutine[Any, Any, State]]) -> None:
        self._history = history
        self._result = result
        self._position = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._history.at(self._position)
        if event is None:
            await self._result()
            raise StopAsyncIteration
        self._position += 1
        return event


class _Pieces:
    """The pieces of one variable, or of all text of a branch."""

    __slots__ = ("_branch", "_events", "_found", "_index", "_name", "_over", "_result")

    def __init__(
        self,
        events: _Events,
        result: Callable[[], Coroutine[Any, Any, State]],
        name: str | None,
        branch: Path,
        index: int,
    ) -> None:
        self._events = events
        self._result = result
        self._name = name
        self._branch = branch
        self._index = index
        self._found = False
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._over:
            try:
                event = await anext(self._events)
            except StopAsyncIteration:
                self._over = True
                if (text := await self._whole()) is not None:
                    return text
                break
            piece = await self._piece(event)
            if piece is not None:
                return piece
        raise StopAsyncIteration

    async def _piece(self, event: Event) -> str | None:
        """The text in ``event``, if it is some of what is read here."""
        name = self._name
        match event:
            case Text() if event.branch == self._branch and name in (None, event.name):
                return event.text if event.index == self._index else None
            case VariableFinished() if self._is_mine(event):
                self._found = self._over = True
            case VariableFailed() if self._is_mine(event):
                self._over = True
                await self._result()  # raises, unless a join keeps the failure to itself
                if isinstance(event.error, Exception):
                    raise event.error
                raise ProgramError(f"the generation of {name!r} was cancelled") from event.error
            case _:
                pass
        return None

    def _is_mine(self, event: VariableFinished | VariableFailed) -> bool:
        return self._name is not None and (event.name, event.branch) == (self._name, self._branch)

    async def _whole(self) -> str | None:
        """At the end of the run: the text of a variable that no model wrote."""
        if self._name is None or self._found:
            return None
        state = await self._result()
        text = state.get(self._name) if not self._branch else None
        if not isinstance(text, str):
            raise UnknownVariable(self._name, state)
        return text


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
        self._task = asyncio.create_task(self._run(), name="asyncsgl-stream")
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
        await ended(task)

    def _require(self) -> asyncio.Task[State]:
        if self._task is None:
            raise ClosedError("enter the stream first: async with prog.stream(...) as run")
        return self._task

    def __aiter__(self) -> AsyncIterator[Event]:
        """All events of the run; at their end, the run's error is raised if it failed."""
        self._require()
        return _Events(self._history, self.result)

    def text(
        self, name: str | None = None, *, branch: Path = (), index: int = 0
    ) -> AsyncIterator[str]:
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
        events = _Events(self._history, self.result)
        return _Pieces(events, self.result, name, branch, index)

    async def result(self) -> State:
        """The finished state.

        Raises:
            Exception: the run's error.
            ClosedError: the stream was left before the run ended.
        """
        task = self._require()
        await asyncio.wait([task])
        if task.cancelled():
            raise ClosedError("this run was cancelled: its stream was left before it ended")
        return task.result()
