"""What the server allows, decided before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError

__all__ = ["Address", "ServerSettings"]

_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits, keys and places of one server.

    Args:
        served_model_name: what clients see; by default the model's path.
        api_key: asked of every route but health, readiness and metrics.
        admin_api_key: asked of the routes that act on the server as a whole.
        max_request_body: bytes of a request's body at most.
        max_uploads: bytes of an uploaded file at most.
        max_requests: generating requests that are let in at most; by default as many as may
            run and wait in the engine.
        request_timeout: seconds a generating request may take, waiting included.
        body_timeout: seconds a client may take to send a body.
        incremental_streaming_output: chunks of `/generate` bring what is new, not all so far.
        allow_local_media: folder below which images may be read from paths.
        allow_media_domains: hosts images may be fetched from.
        max_media_bytes: bytes of one image at most.
        batch_folder: where files and batches are kept; None: no such routes.
        batch_concurrency: requests of batches that run at once.
        profile_folder: where traces are written.

    Raises:
        ConfigError: a setting is out of its range.
    """

    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
    max_request_body: int = 16 << 20
    max_uploads: int = 200 << 20
    max_requests: int | None = None
    request_timeout: float | None = None
    body_timeout: float = 30.0
    incremental_streaming_output: bool = False
    allow_local_media: Path | None = None
    allow_media_domains: tuple[str, ...] = ()
    max_media_bytes: int = 20 << 20
    batch_folder: Path | None = None
    batch_concurrency: int = 32
    profile_folder: Path | None = None

    def __post_init__(self) -> None:
        for name in ("api_key", "admin_api_key"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name}: is empty; leave it out to ask for none")
        for name in (
            "max_request_body",
            "max_uploads",
            "max_media_bytes",
            "batch_concurrency",
            "body_timeout",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: must be above 0, not {getattr(self, name)!r}")
        for name in ("max_requests", "request_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: must be above 0, not {value!r}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to serve, and how much to tell of it.

    Args:
        host: name or address of an interface.
        port: 0 takes a free one.
        log_level: of uvicorn's log; requests are logged from `info` on.

    Raises:
        ConfigError: a setting is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    log_level: str = "error"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: must be in [0, 65535], not {self.port}")
        if self.log_level not in _LEVELS:
            raise ConfigError(f"log_level: {self.log_level!r} is not one of {', '.join(_LEVELS)}")
