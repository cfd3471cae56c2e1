"""What backends can be asked besides answers, blocking for callers that block."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from ..backends.base import Backend
from .portal import PORTAL

__all__ = ["BlockingUtilities"]


class BlockingUtilities(Backend):
    """Gives a backend blocking forms of its utilities, as SGLang's backends have them.

    On the background event loop itself, where programs and the functions of the async API
    run, they give awaitables as those of :class:`~asyncsgl.Backend` do; so they are typed Any.
    """

    def start_profile(self, **options: Any) -> Any:
        """Begin to record; see :meth:`Backend.start_profile`."""
        return _result(lambda: super(BlockingUtilities, self).start_profile(**options))

    def stop_profile(self) -> Any:
        """End the recording; see :meth:`Backend.stop_profile`."""
        return _result(super().stop_profile)

    def get_server_info(self) -> Any:
        """Settings and state; see :meth:`Backend.get_server_info`."""
        return _result(super().get_server_info)

    def flush_cache(self, *, wait: bool = False) -> Any:
        """Empty the prefix cache; see :meth:`Backend.flush_cache`."""
        return _result(lambda: super(BlockingUtilities, self).flush_cache(wait=wait))


def _result(ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return ask() if PORTAL.here else PORTAL.call(ask)
