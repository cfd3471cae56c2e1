"""The HTTP side of a Runtime that serves."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from .._optional import needs
from ..errors import InvalidArgument

if TYPE_CHECKING:
    from asyncsgl_engine.engine import AsyncEngine
    from asyncsgl_engine.server.lifecycle import BackgroundServer
    from asyncsgl_engine.server.settings import ServerSettings

__all__ = ["RuntimeServer"]


class RuntimeServer:
    """Serves an engine from a thread of its own.

    Args:
        engine: what it serves.
        host: the interface.
        port: 0 takes a free one.
        log_level: of the server's log.
        settings: of the server.

    Raises:
        InvalidArgument: the address is out of its range.
        MissingDependency: the extra ``serve`` is not installed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        host: str,
        port: int,
        log_level: str,
        settings: ServerSettings,
    ) -> None:
        from asyncsgl_engine.errors import ConfigError
        from asyncsgl_engine.server.settings import Address

        self._engine = engine
        self._lock = threading.Lock()
        self._server: BackgroundServer | None = None
        try:
            self._address = Address(host, port, log_level)
        except ConfigError as error:
            raise _invalid(error) from error
        self._settings = settings

    @property
    def url(self) -> str | None:
        """The address, while it serves."""
        return None if self._server is None else self._server.url

    async def start(self) -> None:
        """Serve; once, for all who call.

        Raises:
            InvalidArgument: the port is in use.
            MissingDependency: the extra ``serve`` is not installed.
        """
        from asyncsgl_engine.errors import ConfigError

        server = await asyncio.to_thread(self._made)  # its imports take a while
        try:
            await server.start()
        except ConfigError as error:
            raise _invalid(error) from error

    def stop(self) -> None:
        """End it and wait for its thread. Repeatable."""
        with self._lock:
            if self._server is not None:
                self._server.stop()

    def _made(self) -> BackgroundServer:
        with self._lock:
            if self._server is None:
                with needs("serve"):
                    from asyncsgl_engine.server.app import create_app
                    from asyncsgl_engine.server.lifecycle import BackgroundServer
                app = create_app(self._engine, self._settings)
                self._server = BackgroundServer(app, self._address)
            return self._server


def _invalid(error: Exception) -> InvalidArgument:
    field, _, problem = str(error).partition(": ")
    return InvalidArgument(field, problem)
