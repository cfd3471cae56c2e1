"""HTTP/1.1 for many small requests at once: own connections, answers read by httptools."""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import quote, urlsplit

from ..errors import BackendConnectionError, InvalidArgument
from .http import Exchange, HTTPClient, HTTPResponse, HTTPSettings
from .http_answer import Answer, Part
from .http_connection import Connection
from .http_dialer import Dialer
from .http_pool import Pool

__all__ = ["connect_httptools"]

SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
"""Methods of requests that may reach the server twice."""
READ_SIZE = 2**16
"""Bytes that are read in one go."""
IN_PATHS = "/?%:@!$&'()*+,;=-._~"
"""What stands in a path and its query as it is; RFC 3986."""


def connect_httptools(settings: HTTPSettings, context: ssl.SSLContext | None) -> HTTPClient:
    """A client on own connections for the running event loop.

    Raises:
        InvalidArgument: the server is behind a proxy, which this client does not know of, or
            its address holds no name of a host.
    """
    if settings.proxy is not None:
        raise InvalidArgument("library", "httptools knows no proxies: use aiohttp or httpx")
    return _Client(settings, context)


class _Client(HTTPClient):
    """See :class:`HTTPClient`."""

    def __init__(self, settings: HTTPSettings, context: ssl.SSLContext | None) -> None:
        dialer = Dialer(settings.base_url, context)
        room = memoryview(bytearray(READ_SIZE))
        make = functools.partial(Connection, settings.base_url, settings.timeout, room)
        self._pool = Pool(settings.max_connections, make, dialer.connect)
        self._head = functools.lru_cache(64)(functools.partial(_head, settings, dialer.host))

    async def ask(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body; without the generator of :meth:`open`, which costs."""
        connection, answer = await self._asked(method, path, body, exchange, Part.WHOLE)
        self._over(connection)
        return answer.status, answer.headers, answer.taken()

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> AsyncGenerator[HTTPResponse, None]:
        """Ask; see :meth:`HTTPClient.open`."""
        connection, answer = await self._asked(method, path, body, exchange, Part.HEAD)
        try:
            yield answer
        finally:
            self._over(connection)

    async def _asked(
        self, method: str, path: str, body: bytes | None, exchange: Exchange, wanted: Part
    ) -> tuple[Connection, Answer]:
        """Send a request and wait for what is ``wanted`` of its answer.

        A server may close an idle connection just when a request is sent on it. The request is
        sent again on another one where that cannot do anything twice.
        """
        head = self._head(method, path, body is not None)
        if body is not None:
            head = b"%s%d\r\n\r\n" % (head, len(body))
        while True:
            connection = self._pool.take() or await self._pool.get()
            again = connection.reused and method in SAFE
            exchange.sent = True
            answer = connection.begin(head, body, wanted, bodiless=method == "HEAD")
            try:
                await answer.comes(wanted)
            except BackendConnectionError:
                self._over(connection)
                if connection.heard or not again:
                    raise
            except BaseException:
                self._over(connection)
                raise
            else:
                return connection, answer

    def _over(self, connection: Connection) -> None:
        """The exchange on a connection is over: the next may have it, if it is whole."""
        if connection.end():
            self._pool.put(connection)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


def _head(settings: HTTPSettings, host: str, method: str, path: str, has_body: bool) -> bytes:
    """The head of a request; of one with a body, up to the body's size."""
    parts = urlsplit(settings.base_url)
    port = f":{parts.port}" if parts.port else ""
    place = f"[{host}]{port}" if ":" in host else f"{host}{port}"
    headers = {
        "Host": place,
        "User-Agent": "asyncsgl",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        **settings.headers,
    }
    if has_body:
        headers |= {"Content-Type": "application/json", "Content-Length": ""}
    elif method not in SAFE:
        headers["Content-Length"] = "0"
    lines = [f"{method} {quote(parts.path + path, safe=IN_PATHS)} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines).encode("ascii")
    return head if has_body else head + b"\r\n\r\n"
