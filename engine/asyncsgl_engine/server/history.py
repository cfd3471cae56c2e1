"""The last minutes of the engine, for the page that shows them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from ..statistics import Statistics

__all__ = ["History", "Moment"]

EVERY_S = 1.0
_KEPT = 300


@dataclass(frozen=True, slots=True)
class Moment:
    """One look at the engine.

    Args:
        at: seconds since 1970.
        running: requests in the batch.
        waiting: requests in the queue.
        tokens_per_second: tokens drawn since the last look, a second.
        hit_rate: share of prompt tokens found in the cache since the last look; None where
            there were no prompts.
        held: share of the pages that running requests hold.
        cached: share of the pages that only the cache holds.
    """

    at: float
    running: int
    waiting: int
    tokens_per_second: float
    hit_rate: float | None
    held: float
    cached: float


class History:
    """Looks at the engine once a second and keeps five minutes of it.

    Args:
        look: gives the engine's counters.
    """

    def __init__(self, look: Callable[[], Statistics | None]) -> None:
        self._look = look
        self.moments: deque[Moment] = deque(maxlen=_KEPT)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Look on inside the block."""
        task = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _watch(self) -> None:
        before = self._look()
        while True:
            await asyncio.sleep(EVERY_S)
            now = self._look()
            if now is not None and before is not None:
                self.moments.append(_moment(before, now))
            before = now


def _moment(before: Statistics, now: Statistics) -> Moment:
    prompts = now.prompt_tokens - before.prompt_tokens
    return Moment(
        time.time(),
        now.running,
        now.waiting,
        (now.generated_tokens - before.generated_tokens) / EVERY_S,
        (now.cached_tokens - before.cached_tokens) / prompts if prompts else None,
        now.pages_held / now.pages_total,
        now.pages_cached / now.pages_total,
    )
