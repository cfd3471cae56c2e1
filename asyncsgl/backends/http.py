"""HTTP as backends need it: one way to ask, whatever library does it."""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import InvalidArgument

__all__ = [
    "Exchange",
    "HTTPClient",
    "HTTPResponse",
    "HTTPSettings",
    "most_connections",
    "split_user_info",
]

_MOST_CONNECTIONS = 1000

CONNECT_TIMEOUT = 10.0
KEEPALIVE = 3.0
"""Seconds that an idle connection is kept: SGLang's servers drop theirs after 5."""


@dataclass(frozen=True, slots=True)
class HTTPSettings:
    """How to reach one server.

    Args:
        base_url: scheme, host, port and path, without user info and final slash.
        headers: sent with every request; may hold secrets, so they are not shown.
        verify: a CA file or folder; False to trust any certificate.
        timeout: seconds without a byte from the server.
        max_connections: at once, in each event loop; more requests wait for one.
        library: ``"httptools"``, ``"aiohttp"`` or ``"httpx"``; None for the quickest that is
            installed. httptools knows no proxies.

    Raises:
        InvalidArgument: a header cannot be sent.
    """

    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    verify: bool | str = True
    timeout: float = 600.0
    max_connections: int = 1000
    library: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not (value.isascii() and value.isprintable()):
                raise InvalidArgument("headers", f"the value of {name} must be printable ASCII")

    @property
    def secure(self) -> bool:
        """Whether this is https."""
        return self.base_url.startswith("https:")

    @property
    def proxy(self) -> str | None:
        """The proxy that the environment names for this address."""
        parts = urlsplit(self.base_url)
        if proxy_bypass(parts.netloc):
            return None
        proxies = getproxies()
        return proxies.get(parts.scheme) or proxies.get("all")

    def ssl_context(self) -> ssl.SSLContext:
        """The certificates to trust; reads files.

        Raises:
            InvalidArgument: the CA file cannot be read.
        """
        if isinstance(self.verify, bool):
            context = ssl.create_default_context()
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            return context
        path = Path(self.verify)
        try:
            if path.is_dir():
                return ssl.create_default_context(capath=path)
            return ssl.create_default_context(cafile=path)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(
                "verify", f"{self.verify!r} is not a readable CA file: {error}"
            ) from error


@dataclass(slots=True)
class Exchange:
    """How far a request came.

    Attributes:
        sent: something of it went to the server.
    """

    sent: bool = False


class HTTPResponse(Protocol):
    """An answer whose head has come."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in any case."""
        ...

    async def read(self) -> bytes:
        """The whole body."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, cut anywhere."""
        ...


class HTTPClient(ABC):
    """Connections of one event loop to one server."""

    @abstractmethod
    def open(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> AbstractAsyncContextManager[HTTPResponse]:
        """Ask, and wait for the head of the answer; leaving early closes the connection.

        Args:
            method: such as ``"POST"``.
            path: below the server's base URL, with its slash.
            body: JSON.
            exchange: is told how far the request comes.

        Raises:
            BackendTimeout: the server was silent for too long.
            BackendConnectionError: there is no connection, or it broke; also while reading.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close all connections."""

    async def ask(
        self, method: str, path: str, body: bytes | None, exchange: Exchange
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and whole body of the answer; raises as :meth:`open`."""
        async with self.open(method, path, body, exchange) as response:
            return response.status, response.headers, await response.read()


def split_user_info(url: str) -> tuple[str, str | None]:
    """``url`` without its user info and final slash, and the user info.

    Raises:
        InvalidArgument: it is not the address of a server.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidArgument("base_url", f"not an address: {error}") from error
    user, _, place = parts.netloc.rpartition("@")
    clean = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InvalidArgument("base_url", f"must be like 'http://host:30000', got {clean!r}")
    if parts.query or parts.fragment:
        raise InvalidArgument("base_url", f"must have no query and no fragment: {clean!r}")
    return clean, user or None


def most_connections() -> int:
    """How many connections this process may well open: 1,000, or half of its open files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _MOST_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(1, min(_MOST_CONNECTIONS, files // 2))
