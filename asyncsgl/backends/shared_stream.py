"""One stream that several readers follow, each from its beginning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, TypeVar

from ..errors import AsyncSGLError

__all__ = ["GivenUp", "SharedStream"]

T = TypeVar("T")


class GivenUp(AsyncSGLError):
    """A stream was closed as nobody read it any more: begin another."""


class SharedStream(Generic[T]):
    """A stream read by a task of its own, at its own pace, and kept until its last reader left.

    A slow reader holds up neither the stream nor the others. The stream is closed when it has
    ended, or when nobody reads it any more.

    Args:
        stream: what to read; it must have an end, as all of it is kept.
    """

    def __init__(self, stream: AsyncGenerator[T, None]) -> None:
        self._items: list[T] = []
        self._readers = 0
        self._grown = asyncio.Event()
        self._task = asyncio.create_task(self._pump(stream))

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the stream has ended or failed, or was given up."""
        return self._task

    async def read(self) -> AsyncGenerator[T, None]:
        """All items from the first on.

        Raises the stream's exception where it failed, and GivenUp where it was closed.
        """
        self._readers += 1
        try:
            at = 0
            while True:
                grown = self._grown
                while at < len(self._items):
                    yield self._items[at]
                    at += 1
                if self._task.cancelled():
                    raise GivenUp("the stream was given up when nobody read it")
                if self._task.done():
                    self._task.result()
                    return
                if grown is self._grown:
                    await grown.wait()
        finally:
            self._readers -= 1
            if not self._readers:
                self._task.cancel()
                await asyncio.wait([self._task])
                if not self._task.cancelled():
                    self._task.exception()  # its readers have had it, or did not want it

    async def _pump(self, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    self._items.append(item)
                    self._wake()
        finally:
            asyncio.get_running_loop().call_soon(self._wake)  # when the task is done

    def _wake(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()
