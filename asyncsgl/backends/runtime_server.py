"""The HTTP side of a Runtime that serves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .._optional import needs
from ..errors import InvalidArgument

if TYPE_CHECKING:
    from asyncsgl_engine.engine import AsyncEngine
    from asyncsgl_engine.server.lifecycle import BackgroundServer

__all__ = ["RuntimeServer"]


class RuntimeServer:
    """Serves an engine from a thread of its own.

    Args:
        engine: what it serves.
        host: the interface.
        port: 0 takes a free one.
        log_level: of the server's log.
        settings: of the server, by their names: ``api_key``, ``request_timeout`` ….

    Raises:
        InvalidArgument: a setting is unknown or out of its range.
        MissingDependency: the extra ``serve`` is not installed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        host: str,
        port: int,
        log_level: str,
        settings: Mapping[str, object] | None,
    ) -> None:
        from asyncsgl_engine.errors import ConfigError
        from asyncsgl_engine.server.settings import Address, ServerSettings

        self._engine = engine
        self._lock = threading.Lock()
        self._server: BackgroundServer | None = None
        try:
            self._address = Address(host, port, log_level)
            self._settings = ServerSettings(**dict(settings or {}))  # type: ignore[arg-type]
        except ConfigError as error:
            raise _invalid(error) from error
        except TypeError as error:
            raise InvalidArgument("server_settings", f"no such setting: {error}") from error

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
