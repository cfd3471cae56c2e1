"""One event loop's link to an SGLang server: calls, and the aborts of calls given up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from ..errors import AsyncSGLError, BackendError, BackendTimeout, NotFoundError
from .endpoint_info import ModelInfo
from .http import Exchange, HTTPClient
from .http_errors import error_of_body

__all__ = ["Link", "drained"]

_ABORT_TIMEOUT = 2.0
"""Seconds for the server to take note of an abort."""
_LATE_TAIL = 1.0
"""Seconds that a stream may take from its last text to its end."""


class Link:
    """The calls of one event loop.

    Args:
        client: the connections.
        backend: the backend's name, for errors.
    """

    def __init__(self, client: HTTPClient, backend: str) -> None:
        self.info: ModelInfo | None = None
        self.info_lock = asyncio.Lock()
        self._client = client
        self._backend = backend
        self._aborting: set[asyncio.Task[None]] = set()

    async def ask(
        self, method: str, path: str, body: bytes | None = None, *, rid: str | None = None
    ) -> bytes:
        """The body of an answer of status 200.

        Args:
            method: such as ``"POST"``.
            path: with its slash.
            body: JSON.
            rid: the id to abort the request by, if it is given up.

        Raises:
            BackendError: the server refused, failed, or could not be reached.
        """
        exchange = Exchange()
        try:
            status, headers, answer = await self._client.ask(method, path, body, exchange)
        except (asyncio.CancelledError, BackendTimeout):
            await self._given_up(rid, exchange)
            raise
        return self._checked(status, headers, answer, rid)

    @asynccontextmanager
    async def stream(
        self, path: str, body: bytes, *, rid: str | None
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """The bytes of a streamed answer of status 200, as they come; else as :meth:`ask`."""
        exchange = Exchange()
        try:
            async with self._client.open("POST", path, body, exchange) as response:
                if response.status != 200:
                    answer = await response.read()
                    self._checked(response.status, response.headers, answer, rid)
                yield response.chunks()
        except (asyncio.CancelledError, GeneratorExit, BackendTimeout):
            await self._given_up(rid, exchange)
            raise

    async def get_json(self, *paths: str) -> Any:
        """The JSON at the first of ``paths`` that is there; None if none is.

        Raises:
            BackendError: the server refused, failed, or could not be reached.
        """
        for path in paths:
            try:
                answer = await self.ask("GET", path)
            except NotFoundError:
                continue
            try:
                return json.loads(answer)
            except ValueError as error:
                raise BackendError(
                    f"the server's answer at {path} is not JSON", backend=self._backend
                ) from error
        return None

    async def aclose(self) -> None:
        """Close all connections; aborts under way get their time."""
        if self._aborting:
            await asyncio.wait(self._aborting)
        await self._client.aclose()

    def _checked(
        self, status: int, headers: Mapping[str, str], answer: bytes, rid: str | None
    ) -> bytes:
        if status == 200:
            return answer
        raise error_of_body(status, headers, answer, backend=self._backend, request_id=rid)

    async def _given_up(self, rid: str | None, exchange: Exchange) -> None:
        """Tell the server to drop a request whose connection is closed by now."""
        if rid is None or not exchange.sent:
            return
        task = asyncio.ensure_future(self._post_abort(rid))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)
        await asyncio.shield(task)

    async def _post_abort(self, rid: str) -> None:
        """Post the abort; what goes wrong with it changes nothing any more."""
        body = json.dumps({"rid": rid, "abort_all": False, "prefix": True}).encode()
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT):
                await self._client.ask("POST", "/abort_request", body, Exchange())
        except (AsyncSGLError, TimeoutError):
            return


async def drained(chunks: AsyncIterator[bytes]) -> None:
    """Read what is left, so that the connection can be used again; it need not be much."""
    try:
        async with asyncio.timeout(_LATE_TAIL):
            async for _ in chunks:
                pass
    except (TimeoutError, BackendError):
        return
