"""A server of which a test writes every byte, for what no proper server says."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

__all__ = ["Wire", "served"]


class Wire:
    """One connection, seen from the server.

    Attributes:
        number: of the connection, from 0.
    """

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.writer = writer
        self._reader = reader

    async def request(self) -> bytes:
        """The head of the next request, its body read and left out; nothing at the end."""
        head = await self.head()
        _, found, rest = head.lower().partition(b"content-length:")
        if found:
            await self._reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
        return head

    async def head(self) -> bytes:
        """The head of the next request, its body left unread; nothing at the end."""
        try:
            return await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""

    async def say(self, *pieces: bytes) -> None:
        """Send the pieces, each in a packet of its own."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def gone(self) -> None:
        """Wait until the client closes."""
        while await self._reader.read(2**16):
            pass


Handler = Callable[[Wire], Awaitable[None]]


class Served:
    """A running server.

    Attributes:
        url: its address.
        accepted: connections so far.
    """

    def __init__(self) -> None:
        self.url = ""
        self.accepted = 0
        self.open = 0
        self._change = asyncio.Event()

    def changed(self) -> None:
        """Have those who wait look again."""
        self._change.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; looked at when a connection comes or goes."""
        while not condition():
            self._change.clear()
            await self._change.wait()


@asynccontextmanager
async def served(handler: Handler, context: ssl.SSLContext | None = None) -> AsyncIterator[Served]:
    """A server on a free port whose connections ``handler`` serves, each to its end.

    Args:
        handler: serves one connection.
        context: for https.
    """
    here = Served()
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        wire = Wire(here.accepted, reader, writer)
        here.accepted += 1
        here.open += 1
        here.changed()
        try:
            await handler(wire)
        except ConnectionError:
            pass
        finally:
            writer.close()
            here.open -= 1
            here.changed()
            tasks.discard(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=2048, ssl=context)
    here.url = f"http{'s' if context else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield here
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
