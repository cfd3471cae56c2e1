"""The first of several calls that share a prompt goes ahead, so that the rest hit its cache."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import asynccontextmanager

__all__ = ["SentAhead"]

_KEPT = 1024
_FRESH = 240.0
"""Seconds that a service keeps a prompt for certain, with a margin: it says five minutes."""


class SentAhead:
    """Lets one call with a prefix begin before the others with the same prefix."""

    def __init__(self) -> None:
        self._warm: OrderedDict[Hashable, float] = OrderedDict()
        self._leading: dict[tuple[asyncio.AbstractEventLoop, Hashable], asyncio.Event] = {}

    @asynccontextmanager
    async def turn(self, prefix: Hashable) -> AsyncGenerator[Callable[[], None] | None, None]:
        """Wait until a leader's call was answered, or lead.

        Gives a leader the function to call when the service has begun to answer, and None to
        the others. A leader that leaves without calling it, as on an error, lets another lead.
        """
        place = asyncio.get_running_loop(), prefix
        while not self._is_warm(prefix) and (ahead := self._leading.get(place)) is not None:
            await ahead.wait()
        if self._is_warm(prefix):
            yield None
            self._touch(prefix)
            return
        answered = self._leading[place] = asyncio.Event()

        def begun() -> None:
            self._touch(prefix)
            answered.set()

        try:
            yield begun
        finally:
            del self._leading[place]
            answered.set()

    def _is_warm(self, prefix: Hashable) -> bool:
        return time.monotonic() - self._warm.get(prefix, -_FRESH) < _FRESH

    def _touch(self, prefix: Hashable) -> None:
        self._warm[prefix] = time.monotonic()
        self._warm.move_to_end(prefix)
        while len(self._warm) > _KEPT:
            self._warm.popitem(last=False)
