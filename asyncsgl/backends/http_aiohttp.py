"""HTTP over aiohttp: its pool costs the same however many connections are open."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from ..errors import AsyncSGLError, BackendConnectionError, BackendTimeout, ClosedError
from .http import CONNECT_TIMEOUT, KEEPALIVE, Exchange, HTTPClient, HTTPResponse, HTTPSettings

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.payload import BytesPayload

__all__ = ["connect_aiohttp"]


def connect_aiohttp(settings: HTTPSettings, context: ssl.SSLContext | None) -> HTTPClient:
    """A client on aiohttp for the running event loop."""
    from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector

    session = ClientSession(
        connector=TCPConnector(
            limit=settings.max_connections,
            keepalive_timeout=KEEPALIVE,
            ssl=context if context is not None else True,
        ),
        headers={"Accept-Encoding": "identity", **settings.headers},
        cookie_jar=DummyCookieJar(),
        timeout=ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=settings.timeout),
        auto_decompress=False,
        proxy=settings.proxy,
    )
    return _Client(settings, session)


class _Response:
    """See :class:`HTTPResponse`."""

    __slots__ = ("_inner",)

    def __init__(self, inner: ClientResponse) -> None:
        self._inner = inner

    @property
    def status(self) -> int:
        return self._inner.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._inner.headers

    async def read(self) -> bytes:
        return await self._inner.read()

    def chunks(self) -> AsyncIterator[bytes]:
        return self._inner.content.iter_any()


class _Client(HTTPClient):
    """See :class:`HTTPClient`."""

    def __init__(self, settings: HTTPSettings, session: ClientSession) -> None:
        from aiohttp import ClientError
        from yarl import URL

        self._settings = settings
        self._session = session
        self._errors = (ClientError, OSError)  # a timeout is an OSError
        self._url = functools.cache(lambda path: URL(settings.base_url + path, encoded=True))

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> AsyncGenerator[HTTPResponse, None]:
        """Ask; see :meth:`HTTPClient.open`."""
        try:
            async with self._request(method, path, body, exchange) as inner:
                yield _Response(inner)
        except AsyncSGLError:
            raise
        except self._errors as error:
            raise self._translated(error) from error

    async def ask(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body; without the generator of :meth:`open`, which costs."""
        try:
            async with self._request(method, path, body, exchange) as inner:
                return inner.status, inner.headers, await inner.read()
        except self._errors as error:
            raise self._translated(error) from error

    def _request(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> AbstractAsyncContextManager[ClientResponse]:
        if self._session.closed:
            raise ClosedError("this backend is closed: make a new one")
        if body is None:
            exchange.sent = True
        data = _payload()(body, exchange) if body is not None else None
        return self._session.request(method, self._url(path), data=data, allow_redirects=False)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()
        await asyncio.sleep(0)  # the transports say goodbye in the loop's next turn

    def _translated(self, error: Exception) -> AsyncSGLError:
        from aiohttp import ClientSSLError

        where = self._settings.base_url
        if isinstance(error, TimeoutError):
            seconds = self._settings.timeout
            return BackendTimeout(f"{where} was silent for more than {seconds:g} seconds")
        said = str(error) or type(error).__name__
        broken = BackendConnectionError(f"the connection to {where} failed: {said}")
        broken.retryable = not isinstance(error, ClientSSLError)
        return broken


@functools.cache
def _payload() -> type[BytesPayload]:
    """Bytes that tell when they go out; a class of aiohttp's, so made when it is there."""
    from aiohttp.payload import BytesPayload

    class Told(BytesPayload):
        def __init__(self, value: bytes, exchange: Exchange) -> None:
            super().__init__(value, content_type="application/json")
            self._exchange = exchange

        async def write_with_length(
            self, writer: AbstractStreamWriter, content_length: int | None
        ) -> None:
            self._exchange.sent = True
            await super().write_with_length(writer, content_length)

    return Told
