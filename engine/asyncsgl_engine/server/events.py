"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .failures import dumps, failure_of

__all__ = ["ClientLeft", "EventStream", "begun", "unless_left"]

T = TypeVar("T")


class ClientLeft(Exception):
    """Raised when the client closed its connection; nobody reads the answer."""


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for `work`, and cancel it when the client leaves.

    Args:
        receive: of a request whose body was read.
        work: what is done for the client.

    Raises:
        ClientLeft: the client left first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.wait((task, watcher))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def begun(
    receive: Receive, events: AsyncGenerator[object, None]
) -> AsyncGenerator[object, None]:
    """The same events, the first of which is there; what fails before it can have a status.

    Raises:
        ClientLeft: the client left first.
    """
    first = await unless_left(receive, anext(events))
    return _after(first, events)


async def _after(
    first: object, events: AsyncGenerator[object, None]
) -> AsyncGenerator[object, None]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


class EventStream(Response):
    """A stream of JSON events that ends with `[DONE]`.

    Args:
        events: their values; closed when the client leaves. What they raise becomes the last
            event, in the form of an error's body.
        failed: told of what they raised.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[object, None], failed: Callable[[Exception], None]
    ) -> None:
        self._events = events
        self._failed = failed
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the connection's end ends them."""
        try:
            await unless_left(receive, self._send(send))
        except ClientLeft:
            return

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await _event(send, dumps(event))
            except Exception as error:  # noqa: BLE001 - the status is sent; the stream tells it
                self._failed(error)
                await _event(send, dumps(failure_of(error).body()))
        await _event(send, b"[DONE]")
        await _body(send, b"", more=False)


async def _event(send: Send, data: bytes) -> None:
    await _body(send, b"data: " + data + b"\n\n")


async def _body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
