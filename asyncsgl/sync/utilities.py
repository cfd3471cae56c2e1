"""What can be asked of the server or engine behind a backend, for callers that block."""

from __future__ import annotations

from ..backends.base import Backend
from ..program import utilities
from .portal import PORTAL

__all__ = ["cache_prefix", "flush_cache", "get_server_info", "start_profile", "stop_profile"]


def get_server_info(backend: Backend | None = None) -> dict[str, object]:
    """As :func:`asyncsgl.get_server_info`, blocking."""
    return PORTAL.call(lambda: utilities.get_server_info(backend))


def flush_cache(backend: Backend | None = None, *, wait: bool = False) -> bool:
    """As :func:`asyncsgl.flush_cache`, blocking."""
    return PORTAL.call(lambda: utilities.flush_cache(backend, wait=wait))


def start_profile(
    backend: Backend | None = None,
    *,
    output_dir: str | None = None,
    num_steps: int | None = None,
) -> str:
    """As :func:`asyncsgl.start_profile`, blocking."""
    return PORTAL.call(
        lambda: utilities.start_profile(backend, output_dir=output_dir, num_steps=num_steps)
    )


def stop_profile(backend: Backend | None = None) -> str:
    """As :func:`asyncsgl.stop_profile`, blocking."""
    return PORTAL.call(lambda: utilities.stop_profile(backend))


def cache_prefix(text: str, backend: Backend | None = None) -> None:
    """As :func:`asyncsgl.cache_prefix`, blocking."""
    PORTAL.call(lambda: utilities.cache_prefix(text, backend))
