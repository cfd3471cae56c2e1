"""A streaming run for callers that block."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from types import TracebackType
from typing import Any, Self

from ..program.call import Call
from ..program.events import Text, VariableFinished
from ..program.result import State
from ..program.stream import ProgramStream
from ..types import Meta
from .portal import Portal

__all__ = ["StreamingState"]

_END = object()


class StreamingState:
    """A run that goes on while its text is read; what ``run(stream=True)`` gives.

    Reading a variable waits for it. Used as ``with``, leaving early cancels what is left;
    otherwise dropping it does.
    """

    def __init__(self, portal: Portal, call: Call) -> None:
        self._portal = portal
        self._stream = ProgramStream(functools.partial(call.run, streaming=True))
        portal.call(self._stream.__aenter__)
        self._close = weakref.finalize(self, _cancel, portal, self._stream)

    def text_iter(self, var_name: str | None = None) -> Generator[str, None, None]:
        """The pieces of a variable, or of all text of the main branch where none is named.

        Raises:
            Exception: the run's error.
        """
        pieces = self._stream.text(var_name)
        while True:
            piece = self._portal.call(functools.partial(_next, pieces))
            if piece is _END:
                return
            yield str(piece)

    async def text_async_iter(
        self, var_name: str | None = None, return_meta_data: bool = False
    ) -> AsyncGenerator[Any, None]:
        """The pieces of a variable, without blocking the caller's event loop.

        Args:
            var_name: the variable; None for all text of the main branch.
            return_meta_data: give (piece, :class:`~asyncsgl.Meta`) pairs: the meta has the
                piece's logprobs; a last pair of an empty piece has the variable's whole meta.

        Raises:
            Exception: the run's error.
        """
        pieces = self._pieces(var_name, with_meta=return_meta_data)
        try:
            while True:
                future, cancel = self._portal.submit(functools.partial(_next, pieces))
                try:
                    piece = await asyncio.wrap_future(future)
                except asyncio.CancelledError:
                    cancel()
                    raise
                if piece is _END:
                    return
                yield piece
        finally:
            closing, _ = self._portal.submit(functools.partial(_aclose, pieces))
            await asyncio.shield(asyncio.wrap_future(closing))

    async def _pieces(self, name: str | None, *, with_meta: bool) -> AsyncGenerator[Any, None]:
        if not with_meta:
            async for piece in self._stream.text(name):
                yield piece
            return
        async for event in self._stream:
            match event:
                case Text(branch=()) if name in (None, event.name):
                    yield event.text, Meta(logprobs=event.logprobs or None)
                case VariableFinished(branch=()) if event.name == name:
                    yield "", event.meta
                    return
                case _:
                    pass

    def _result(self) -> State:
        return self._portal.call(self._stream.result)

    def __getitem__(self, name: str) -> Any:
        """The text of a variable, as soon as it is finished.

        Raises:
            UnknownVariable: the run ended without it.
            Exception: the run's error.
        """
        return self._portal.call(functools.partial(_variable, self._stream, name))

    def get_var(self, name: str) -> Any:
        """The same as ``state[name]``."""
        return self[name]

    def get_meta_info(self, name: str) -> Any:
        """How a variable came about; waits for the run's end."""
        return self._result().meta(name)

    def meta(self, name: str) -> Any:
        """The same as :meth:`get_meta_info`."""
        return self.get_meta_info(name)

    def value(self, name: str) -> Any:
        """The typed value of a variable; waits for the run's end."""
        return self._result().value(name)

    def text(self) -> str:
        """Everything that the run wrote; waits for its end."""
        return self._result().text()

    def messages(self) -> list[dict[str, Any]]:
        """The turns; waits for the run's end."""
        return self._result().messages()

    def sync(self) -> None:
        """Wait for the run's end. Raises its error."""
        self._result()

    def error(self) -> Exception | None:
        """Wait for the run's end: its error, or None."""
        try:
            self._result()
        except Exception as error:  # noqa: BLE001 - asked for
            return error
        return None

    @property
    def return_value(self) -> Any:
        """What the program's function returned; waits for the run's end."""
        return self._result().return_value

    @property
    def ret_value(self) -> Any:
        """The same as :attr:`return_value`."""
        return self.return_value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._close.detach()
        self._portal.call(functools.partial(self._stream.__aexit__, exc_type, exc, tb))


def _cancel(portal: Portal, stream: ProgramStream) -> None:
    portal.submit(functools.partial(stream.__aexit__, None, None, None))


async def _next(pieces: AsyncIterator[Any]) -> object:
    return await anext(pieces, _END)


async def _aclose(pieces: AsyncGenerator[Any, None]) -> None:
    await pieces.aclose()


async def _variable(stream: ProgramStream, name: str) -> Any:
    async for event in stream:
        if isinstance(event, VariableFinished) and event.name == name and not event.branch:
            return event.value
    return (await stream.result())[name]
