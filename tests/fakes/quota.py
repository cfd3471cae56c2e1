"""An allowance of requests and tokens in any minute, and a clock that jumps over waiting."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable

from asyncsgl.backends.retry import Clock

MINUTE = 60.0


class Quota:
    """Counts what was let through in the last minute, whenever that began.

    Args:
        rpm: requests in any minute.
        tpm: tokens in any minute.
        now: seconds.

    Attributes:
        refused: when requests were refused.
        taken: when requests were let through, of all time.
    """

    def __init__(self, rpm: int, tpm: int, now: Callable[[], float]) -> None:
        self.rpm = rpm
        self.tpm = tpm
        self.refused: list[float] = []
        self.taken: list[tuple[float, int]] = []
        self._now = now
        self._window: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def take(self, tokens: int) -> float:
        """Let a request through and give 0, or the seconds after which there may be room."""
        now = self._now()
        while self._window and self._window[0][0] <= now - MINUTE:
            self._tokens -= self._window.popleft()[1]
        if len(self._window) >= self.rpm or self._tokens + tokens > self.tpm:
            self.refused.append(now)
            return self._window[0][0] + MINUTE - now
        self._window.append((now, tokens))
        self._tokens += tokens
        self.taken.append((now, tokens))
        return 0.0

    def use(self, requests: int, tokens: int) -> None:
        """Somebody else uses so many requests with so many tokens each, now."""
        self._window.extend([(self._now(), tokens)] * requests)
        self._tokens += requests * tokens

    def share(self) -> float:
        """The share of the allowance that was used, from the first request to the last."""
        begun, ended = self.taken[0][0], self.taken[-1][0]
        requests = (len(self.taken) - 1) / self.rpm
        tokens = sum(size for _, size in self.taken[1:]) / self.tpm
        return max(requests, tokens) * MINUTE / (ended - begun)


class JumpingTime:
    """A clock for many tasks: when nothing else can run, it jumps to the next who wakes.

    Args:
        settled: turns of the event loop in which all that can run has run.
    """

    def __init__(self, settled: int = 20) -> None:
        self.now = 0.0
        self._settled = settled
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = itertools.count()
        self.clock = Clock(lambda: self.now, self.sleep, lambda: 0.5, lambda: self.now)

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        entry = (self.now + seconds, next(self._count), future)
        heapq.heappush(self._sleepers, entry)
        await future

    async def run(self, main: asyncio.Task[None]) -> None:
        """Jump until ``main`` is done."""
        while not main.done():
            for _ in range(self._settled):
                await asyncio.sleep(0)
            while self._sleepers and self._sleepers[0][2].done():
                heapq.heappop(self._sleepers)
            if self._sleepers and not main.done():
                self.now, _, future = heapq.heappop(self._sleepers)
                future.set_result(None)
        await main
