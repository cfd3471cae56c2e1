"""As much of an HTTP/1.1 server as a fake needs, with every byte in the fake's hands."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

__all__ = ["Connection", "Dropped", "Listener", "Request"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came.

    Args:
        method: such as ``"POST"``.
        path: with its query.
        headers: names in small letters.
        body: as it came.
        peer: the client's port: the same for requests on one connection.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    peer: int = 0

    @property
    def json(self) -> Any:
        """The body, read as JSON; an empty object where there is none."""
        return json.loads(self.body) if self.body else {}


class Dropped(Exception):
    """Raised by a handler to break the connection."""


class _Reader(asyncio.StreamReader):
    """Tells when the client closes the connection, also while nothing is read."""

    def __init__(self) -> None:
        super().__init__(limit=2**26)
        self.ended = asyncio.Event()

    def feed_eof(self) -> None:
        self.ended.set()
        super().feed_eof()

    def set_exception(self, exc: Exception) -> None:
        self.ended.set()
        super().set_exception(exc)


class Connection:
    """One connection of a client."""

    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.peer = int(writer.get_extra_info("peername")[1])

    async def request(self, idle: float) -> Request | None:
        """The next request; None if the client leaves, or is idle for too long."""
        try:
            async with asyncio.timeout(idle):
                head = await self._reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        try:
            body = await self._body(headers)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return Request(method, path, headers, body, self.peer)

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(headers.get("content-length", 0)))
        pieces: list[bytes] = []
        while size := int(await self._reader.readline(), 16):
            pieces.append(await self._reader.readexactly(size))
            await self._reader.readline()
        await self._reader.readline()
        return b"".join(pieces)

    async def gone(self) -> None:
        """Wait until the client closes the connection."""
        await self._reader.ended.wait()

    async def send(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole answer."""
        self._head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self._writer.write(body)
        await self._flush()

    async def begin_stream(self) -> None:
        """The head of a stream of events."""
        self._head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        await self._flush()

    async def packet(self, data: bytes) -> None:
        """One piece of a stream."""
        if data:
            self._writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await self._flush()

    async def end_stream(self) -> None:
        """The end of a stream."""
        self._writer.write(b"0\r\n\r\n")
        await self._flush()

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join((*lines, "", "")).encode("latin-1"))

    async def _flush(self) -> None:
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise Dropped from error

    async def close(self, *, abruptly: bool = False) -> None:
        """Close it; ``abruptly`` with a reset."""
        if abruptly:
            self._writer.transport.abort()
        self._writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await self._writer.wait_closed()


Handler = Callable[[Request, Connection], Awaitable[None]]


class Listener:
    """Takes connections on a free port of 127.0.0.1 and hands their requests to ``handler``.

    A handler is cancelled when its client leaves; it raises :class:`Dropped` to break the
    connection.

    Args:
        handler: answers one request.
        changed: called when a connection comes or goes.
        idle: seconds that a connection may be idle.
        context: for https.
    """

    def __init__(
        self,
        handler: Handler,
        changed: Callable[[], None],
        idle: float,
        context: ssl.SSLContext | None,
    ) -> None:
        self._handler = handler
        self._changed = changed
        self._idle = idle
        self._context = context
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self.port = 0

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._serving)

    async def start(self) -> None:
        """Begin to listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._protocol, "127.0.0.1", 0, backlog=4096, ssl=self._context
        )
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close everything."""
        assert self._server is not None
        self._server.close()
        tasks = [*self._serving]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = _Reader()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.accepted += 1
            task = asyncio.create_task(self._serve(Connection(reader, writer)))
            self._serving.add(task)
            task.add_done_callback(self._ended)
            self._changed()

        return asyncio.StreamReaderProtocol(reader, accept)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._changed()

    async def _serve(self, connection: Connection) -> None:
        dropped = False
        try:
            while (request := await connection.request(self._idle)) is not None:
                if not await self._answer(request, connection):
                    break
        except Dropped:
            dropped = True
        finally:
            await connection.close(abruptly=dropped)

    async def _answer(self, request: Request, connection: Connection) -> bool:
        """Answer one request; False if the client left meanwhile."""
        answering = asyncio.ensure_future(self._handler(request, connection))
        leaving = asyncio.ensure_future(connection.gone())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            left = leaving.done() and not answering.done()
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.wait((answering, leaving))
        if not answering.cancelled():
            answering.result()
        return not left
