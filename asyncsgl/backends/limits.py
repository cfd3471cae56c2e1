"""Requests and tokens a minute, calls at once, and budgets: one limiter for each key and model.

The limits are paced: a fiftieth of a minute's allowance may be used at once, the rest comes
evenly, so that no minute, wherever it begins, holds more than 98.5 in a hundred. What is left is
for calls that take longer on their way than those after them, and arrive together.
"""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..errors import InvalidArgument
from ..types import Usage
from .retry import SYSTEM_CLOCK, Clock, Cooldown, cooldown_for, held_back, secret_id

__all__ = ["MAX_ADAPTIVE", "Concurrency", "Limiter", "Ticket", "limiter_for"]

Concurrency = int | str | None
"""How many calls at once: a number, ``"auto"``, or None for no limit."""

MAX_ADAPTIVE = 4096
"""The most calls at once that ``"auto"`` comes to."""
_BURST = 0.02
_FULL = 0.985
_MINUTE = 60.0


class _Bucket:
    """An allowance that refills evenly; it may be overdrawn by one large request."""

    __slots__ = ("_at", "_clock", "capacity", "level", "rate")

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self.capacity = max(1.0, per_minute * _BURST)
        self.rate = max(per_minute * _FULL - self.capacity, per_minute / 2) / _MINUTE
        self.level = self.capacity
        self._clock = clock
        self._at = clock.now()

    def wait(self, amount: float) -> float:
        """Seconds until ``amount`` may be taken; 0 for now."""
        now = self._clock.now()
        gained = (now - self._at) * self.rate
        self._at = now
        if self.level < self.capacity:
            self.level = min(self.capacity, self.level + gained)
        missing = min(amount, self.capacity) - self.level
        return 0.0 if missing <= 1e-9 else max(missing / self.rate, 1e-6)

    def take(self, amount: float) -> None:
        self.level -= amount


class _AIMD:
    """How many calls at once: one more for each round that went well, fewer on overload.

    Additive increase, multiplicative decrease, as TCP does it (RFC 5681). Calls that go well
    while less than half of the room is used prove nothing and change nothing (RFC 7661).
    """

    __slots__ = ("_epoch", "limit")

    def __init__(self) -> None:
        self.limit = 16.0
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """Which decrease the calls that begin now come after."""
        return self._epoch

    def succeeded(self) -> None:
        self.limit = min(float(MAX_ADAPTIVE), self.limit + 1.0 / self.limit)

    def refused(self, epoch: int) -> None:
        """Decrease, once for all calls that were under way together."""
        if epoch == self._epoch:
            self._epoch += 1
            self.limit = max(1.0, self.limit * 0.7)


@dataclass(slots=True, eq=False)
class _Waiter:
    need: float
    patience: float
    loop: asyncio.AbstractEventLoop
    turn: asyncio.Event

    def wake(self) -> None:
        try:
            here = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            here = False
        if here:
            self.turn.set()
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.turn.set)


@dataclass(slots=True, eq=False)
class Ticket:
    """The leave for one call.

    Args:
        reserved: tokens that were estimated for it.
        epoch: of the adaptive concurrency when it began.
    """

    reserved: float
    epoch: int
    usage: Usage | None = None
    guessed: Usage | None = None
    overloaded: bool = False

    @property
    def cost(self) -> Usage | None:
        """What the call cost, guessed where that was not said; None if it cost nothing."""
        return self.usage or self.guessed

    def settle(self, usage: Usage) -> None:
        """The call has ended and cost ``usage``."""
        self.usage = usage

    def guess(self, usage: Usage) -> None:
        """The call was left before its end, and has cost about ``usage``."""
        self.guessed = usage

    def refuse(self) -> None:
        """The provider was overloaded."""
        self.overloaded = True


class Limiter:
    """Lets calls through first in, first out, as fast as the limits allow.

    Used from any number of tasks, threads and event loops.

    Args:
        rpm: requests a minute; None for no limit.
        tpm: tokens a minute, prompt and answer together; None for no limit.
        concurrency: calls at once; ``"auto"`` finds out how many the provider bears.
        cooldown: nothing is let through while it lasts.
        clock: time.

    Raises:
        InvalidArgument: a limit is out of its range.
    """

    def __init__(
        self,
        *,
        rpm: float | None = None,
        tpm: float | None = None,
        concurrency: Concurrency = None,
        cooldown: Cooldown | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self.cooldown = cooldown or Cooldown(clock)
        self._lock = threading.Lock()
        self._queue: deque[_Waiter] = deque()
        self._running = 0
        self._requests: _Bucket | None = None
        self._tokens: _Bucket | None = None
        self._fixed: int | None = None
        self._adaptive: _AIMD | None = None
        self.configure(rpm=rpm, tpm=tpm, concurrency=concurrency)

    def configure(
        self,
        *,
        rpm: float | None = None,
        tpm: float | None = None,
        concurrency: Concurrency = None,
    ) -> None:
        """Set the limits that are given; those that are None stay as they are."""
        for name, value in (("rpm", rpm), ("tpm", tpm)):
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgument(name, f"must be above 0, got {value!r}")
        if isinstance(concurrency, str) and concurrency != "auto":
            raise InvalidArgument("concurrency", f'must be a number or "auto", got {concurrency!r}')
        if isinstance(concurrency, int) and concurrency < 1:
            raise InvalidArgument("concurrency", f"must be at least 1, got {concurrency!r}")
        if rpm is not None:
            self._requests = _Bucket(rpm, self._clock)
        if tpm is not None:
            self._tokens = _Bucket(tpm, self._clock)
        if isinstance(concurrency, str):
            self._adaptive = self._adaptive or _AIMD()
        elif concurrency is not None:
            self._fixed = concurrency

    @property
    def running(self) -> int:
        """Calls under way."""
        return self._running

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return len(self._queue)

    @property
    def concurrency(self) -> float:
        """How many calls may be under way at once."""
        limits = [math.inf if self._fixed is None else float(self._fixed)]
        if self._adaptive is not None:
            limits.append(math.floor(self._adaptive.limit))
        return min(limits)

    @asynccontextmanager
    async def admitted(self, tokens: float = 0.0) -> AsyncGenerator[Ticket, None]:
        """Wait for this call's turn; leaving ends the call.

        Args:
            tokens: an estimate of what the call will cost.
        """
        ticket = await self.enter(tokens)
        try:
            yield ticket
        finally:
            self.leave(ticket)

    async def enter(self, tokens: float = 0.0, *, patience: float = math.inf) -> Ticket:
        """Wait for this call's turn; :meth:`leave` must follow.

        Args:
            tokens: an estimate of what the call will cost.
            patience: the longest cooldown that is waited for, in seconds.

        Raises:
            OverloadedError: the cooldown is longer.
        """
        waiter = _Waiter(tokens, patience, asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._queue.append(waiter)
        try:
            await self._turn(waiter)
        except BaseException:
            with self._lock:
                self._queue.remove(waiter)
            self._wake_first()
            raise
        return Ticket(tokens, self._adaptive.epoch if self._adaptive is not None else 0)

    async def _turn(self, waiter: _Waiter) -> None:
        while True:
            waiter.turn.clear()
            with self._lock:
                delay = self._try(waiter)
            if delay == 0:
                return
            if delay == math.inf:
                await waiter.turn.wait()
            else:
                await self._clock.sleep(delay)

    def _try(self, waiter: _Waiter) -> float:
        """Let ``waiter`` in and give 0, or how long it has to wait; infinity: until woken."""
        if self._queue[0] is not waiter or self._running >= self.concurrency:
            return math.inf
        delay = self.cooldown.remaining
        if delay > waiter.patience:
            raise held_back(delay, waiter.patience)
        if self._requests is not None:
            delay = max(delay, self._requests.wait(1.0))
        if self._tokens is not None:
            delay = max(delay, self._tokens.wait(waiter.need))
        if delay > 0:
            return delay
        if self._requests is not None:
            self._requests.take(1.0)
        if self._tokens is not None:
            self._tokens.take(waiter.need)
        self._running += 1
        self._queue.popleft()
        if self._queue:
            self._queue[0].wake()
        return 0.0

    def leave(self, ticket: Ticket) -> None:
        """The call that ``ticket`` let through has ended."""
        with self._lock:
            full = bool(self._queue) or 2 * self._running > self.concurrency
            self._running -= 1
            if self._tokens is not None and ticket.cost is not None:
                self._tokens.take(ticket.cost.total_tokens - ticket.reserved)
            if self._adaptive is not None:
                if ticket.overloaded:
                    self._adaptive.refused(ticket.epoch)
                elif ticket.usage is not None and full:
                    self._adaptive.succeeded()
        self._wake_first()

    def _wake_first(self) -> None:
        with self._lock:
            first = self._queue[0] if self._queue else None
        if first is not None:
            first.wake()


_limiters: weakref.WeakValueDictionary[tuple[str, str, str], Limiter] = (
    weakref.WeakValueDictionary()
)
_limiters_lock = threading.Lock()


def limiter_for(
    provider: str,
    key: str | None,
    model: str,
    *,
    rpm: float | None = None,
    tpm: float | None = None,
    concurrency: Concurrency = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Limiter:
    """The limiter that all backends of this process share for provider, key and model.

    Args:
        provider: the provider's name, or a server's address.
        key: the API key; only a digest of it is kept.
        model: the model's name.
        rpm: see :class:`Limiter`; the limit that was given last holds.
        tpm: the same.
        concurrency: the same.
        clock: time, for the first that asks for it.
    """
    place = (provider, secret_id(key), model)
    with _limiters_lock:
        limiter = _limiters.get(place)
        if limiter is None:
            cooldown = cooldown_for(provider, key, model, clock)
            limiter = _limiters[place] = Limiter(cooldown=cooldown, clock=clock)
    limiter.configure(rpm=rpm, tpm=tpm, concurrency=concurrency)
    return limiter
