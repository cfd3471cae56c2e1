"""Makes connections to one server: its name looked up once for many, addresses tried by turns."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .._optional import needs
from ..errors import AsyncSGLError, BackendConnectionError, BackendTimeout, InvalidArgument
from .http import CONNECT_TIMEOUT

with needs("http"):
    from aiohappyeyeballs import start_connection

if TYPE_CHECKING:
    from aiohappyeyeballs import AddrInfoType

__all__ = ["Dialer"]

KNOWN_FOR = 10.0
"""Seconds that a server's addresses are remembered."""
NEXT_ADDRESS = 0.25
"""Seconds after which the next address is tried beside one that has not answered; RFC 8305."""


class Dialer:
    """Makes connections to one server.

    Args:
        base_url: the server's.
        context: for https.

    Attributes:
        host: the server's name, as it goes over the wire.

    Raises:
        InvalidArgument: the address holds no name that could be looked up.
    """

    def __init__(self, base_url: str, context: ssl.SSLContext | None) -> None:
        parts = urlsplit(base_url)
        try:
            self.host = (parts.hostname or "").encode("idna").decode()
        except UnicodeError as error:
            raise InvalidArgument("base_url", f"{base_url!r} has no name of a host") from error
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._where = base_url
        self._context = context
        self._known: Sequence[AddrInfoType] = ()
        self._known_until = 0.0
        self._asking = asyncio.Lock()

    async def connect(self, protocol: asyncio.BaseProtocol) -> None:
        """Connect ``protocol``.

        Raises:
            BackendTimeout: it took too long.
            BackendConnectionError: the server cannot be reached, or not trusted.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                made = await start_connection(
                    await self._addresses(), happy_eyeballs_delay=NEXT_ADDRESS, loop=loop
                )
                await loop.create_connection(
                    lambda: protocol,
                    sock=made,
                    ssl=self._context,
                    server_hostname=self.host if self._context is not None else None,
                )
        except OSError as error:
            self._known_until = 0.0
            raise self._translated(error) from error

    async def _addresses(self) -> Sequence[AddrInfoType]:
        """The server's addresses; many who ask at once wait for one look-up."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._known_until:
            async with self._asking:
                if loop.time() >= self._known_until:
                    self._known = await loop.getaddrinfo(
                        self.host, self._port, type=socket.SOCK_STREAM
                    )
                    self._known_until = loop.time() + KNOWN_FOR
        return self._known

    def _translated(self, error: OSError) -> AsyncSGLError:
        if isinstance(error, TimeoutError):
            return BackendTimeout(
                f"{self._where} took no connection within {CONNECT_TIMEOUT:g} seconds"
            )
        said = str(error) or type(error).__name__
        failed = BackendConnectionError(f"the connection to {self._where} failed: {said}")
        failed.retryable = not isinstance(error, ssl.SSLError)
        return failed
