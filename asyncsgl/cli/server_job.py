"""One server process: its engine, its socket, its end."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument, MissingDependency

if TYPE_CHECKING:
    from asyncsgl_engine.config import EngineConfig
    from asyncsgl_engine.server.settings import Address, ServerSettings

__all__ = ["DEFAULT_PORT", "DEFAULT_QUEUE", "ServerJob"]

DEFAULT_PORT = 30000
DEFAULT_QUEUE = 2048


@dataclass(frozen=True)
class ServerJob:
    """What to serve and how.

    Args:
        engine: settings of the engine, by their names.
        server: settings of the server, by their names.
        host: the interface.
        port: 0 takes a free one.
        log_level: of the server's log.
        drain_limit: seconds that running requests get at the end.
        batches: whether to keep files and batches.
    """

    engine: dict[str, Any]
    server: dict[str, Any] = field(repr=False)  # keys are among them
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    log_level: str = "info"
    drain_limit: float = 30.0
    batches: bool = True

    def run(self) -> int:
        """Serve until a signal ends it.

        Returns:
            The exit status.

        Raises:
            InvalidArgument: a setting is out of its range, or the address is in use.
            MissingDependency: the extras are not installed.
        """
        try:
            import fastapi  # noqa: F401 - asked for before anything is loaded
            import uvicorn  # noqa: F401

            from asyncsgl_engine.config import EngineConfig
            from asyncsgl_engine.errors import ConfigError
            from asyncsgl_engine.server.settings import Address, ServerSettings
        except ImportError as error:
            raise MissingDependency(error.name or "fastapi", "engine,serve") from error
        try:
            config = EngineConfig(**self.engine)
            settings = ServerSettings(**{"batch_folder": self._batch_folder(), **self.server})
            address = Address(self.host, self.port, self.log_level)
            return asyncio.run(self._serve(config, settings, address))
        except ConfigError as error:
            field, _, problem = str(error).partition(": ")
            raise InvalidArgument(field, problem) from error

    def _batch_folder(self) -> Path | None:
        if not self.batches:
            return None
        from platformdirs import user_data_path

        return user_data_path("asyncsgl") / "server"

    async def _serve(self, config: EngineConfig, settings: ServerSettings, address: Address) -> int:
        from asyncsgl_engine.engine import AsyncEngine
        from asyncsgl_engine.server import create_app
        from asyncsgl_engine.server.lifecycle import bind, serve

        sock = bind(address)
        engine = AsyncEngine(config)
        begun = False

        def ready(url: str) -> None:
            nonlocal begun
            begun = True
            _say(f"ready on {url} with {config.model_path}")

        try:
            return await serve(
                create_app(engine, settings),
                sock,
                log_level=self.log_level,
                drain_limit=self.drain_limit,
                ready=ready,
            )
        finally:
            sock.close()
            if begun:  # else it is loading, which cannot be hurried and need not be waited for
                await engine.aclose()


def _say(line: str) -> None:
    sys.stderr.write(f"asyncsgl: {line}\n")
    sys.stderr.flush()
