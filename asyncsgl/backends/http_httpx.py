"""HTTP over httpx: always installed, and dear where hundreds of connections are open."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ..errors import AsyncSGLError, BackendConnectionError, BackendTimeout, ClosedError
from .http import CONNECT_TIMEOUT, KEEPALIVE, Exchange, HTTPClient, HTTPResponse, HTTPSettings

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

__all__ = ["connect_httpx"]

MOST_CONNECTIONS = 100
"""Its pool looks at every connection for every request."""


def connect_httpx(settings: HTTPSettings, context: ssl.SSLContext | None) -> HTTPClient:
    """A client on httpx for the running event loop."""
    from httpx import AsyncClient, Limits, Timeout

    connections = min(settings.max_connections, MOST_CONNECTIONS)
    client = AsyncClient(
        headers={"Accept-Encoding": "identity", **settings.headers},
        verify=context if context is not None else False,
        limits=Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=KEEPALIVE,
        ),
        # requests wait for a connection as long as it takes: the program's own deadline counts
        timeout=Timeout(settings.timeout, connect=CONNECT_TIMEOUT, pool=None),
        proxy=settings.proxy,
        trust_env=False,
    )
    return _Client(settings, client)


class _Response:
    """See :class:`HTTPResponse`."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Response) -> None:
        self._inner = inner

    @property
    def status(self) -> int:
        return self._inner.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        return self._inner.headers

    async def read(self) -> bytes:
        return await self._inner.aread()

    def chunks(self) -> AsyncIterator[bytes]:
        return self._inner.aiter_raw()


class _Client(HTTPClient):
    """See :class:`HTTPClient`."""

    def __init__(self, settings: HTTPSettings, client: AsyncClient) -> None:
        self._settings = settings
        self._client = client

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> AsyncGenerator[HTTPResponse, None]:
        """Ask; see :meth:`HTTPClient.open`."""
        from httpx import HTTPError

        if self._client.is_closed:
            raise ClosedError("this backend is closed: make a new one")

        async def trace(event: str, _: Mapping[str, Any]) -> None:
            if event.endswith("send_request_headers.started"):
                exchange.sent = True

        try:
            async with self._client.stream(
                method,
                self._settings.base_url + path,
                content=body,
                headers={"Content-Type": "application/json"} if body is not None else None,
                extensions={"trace": trace},
            ) as inner:
                yield _Response(inner)
        except HTTPError as error:
            raise self._translated(error) from error

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def _translated(self, error: Exception) -> AsyncSGLError:
        from httpx import TimeoutException

        where = self._settings.base_url
        if isinstance(error, TimeoutException):
            seconds = self._settings.timeout
            return BackendTimeout(f"{where} was silent for more than {seconds:g} seconds")
        said = str(error) or type(error).__name__
        broken = BackendConnectionError(f"the connection to {where} failed: {said}")
        broken.retryable = not _certificate(error)
        return broken


def _certificate(error: BaseException | None) -> bool:
    """Whether a certificate is why."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
