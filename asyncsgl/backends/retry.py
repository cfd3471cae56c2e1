"""The one retry loop: back-off with jitter, Retry-After, shared cooldowns, a deadline."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from ..errors import BackendError, InvalidArgument, OverloadedError

__all__ = [
    "Clock",
    "Cooldown",
    "RetryPolicy",
    "cooldown_for",
    "held_back",
    "is_retryable",
    "retried",
    "retried_stream",
    "retry_after",
    "secret_id",
]

T = TypeVar("T")
OnRetry = Callable[[int, BackendError, float], None]

_RETRYABLE_STATUS = frozenset({408, 409, 425, 500, 502, 503, 504, 529})


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and chance, so that tests need neither.

    Args:
        now: seconds on a clock that never goes back.
        sleep: wait so many seconds.
        random: a number in [0, 1).
        wall: seconds since 1970, for dates in headers.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    wall: Callable[[], float] = time.time


SYSTEM_CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    The wait before retry ``k`` (from 0) is drawn from 0 to ``first_delay * 2**k``, at most
    ``max_delay`` ("full jitter"), unless the backend says how long to wait.

    Args:
        max_retries: tries after the first; 0 for none.
        first_delay: seconds.
        max_delay: seconds.
        deadline: seconds from the first try after which no other begins, without those in
            which it waited for its turn here; None for no end.

    Raises:
        InvalidArgument: a value is out of its range.
    """

    max_retries: int = 4
    first_delay: float = 0.5
    max_delay: float = 30.0
    deadline: float | None = 600.0

    def __post_init__(self) -> None:
        if isinstance(self.max_retries, bool) or self.max_retries < 0:
            raise InvalidArgument("max_retries", f"must be 0 or more, got {self.max_retries!r}")
        if self.deadline is not None and self.deadline <= 0:
            raise InvalidArgument("deadline", f"must be above 0, got {self.deadline!r}")

    def delay(self, retry: int, error: BackendError, clock: Clock) -> float:
        """Seconds to wait before retry number ``retry``, from 0, after ``error``."""
        if error.retry_after is not None:
            # a little later than asked for, each at another time: not all come back at once
            return error.retry_after * (1 + 0.1 * clock.random()) + 0.05 * clock.random()
        ceiling: float = min(self.max_delay, self.first_delay * 2.0 ** min(retry, 60))
        return ceiling * clock.random()


class Cooldown:
    """A pause that all calls to one (provider, key, model) keep, in any thread or loop."""

    __slots__ = ("__weakref__", "_clock", "_lock", "_until")

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._until = -math.inf
        self._lock = threading.Lock()

    @property
    def remaining(self) -> float:
        """Seconds until calls may go on; 0 if they may now."""
        return max(0.0, self._until - self._clock.now())

    def pause(self, seconds: float) -> None:
        """Hold all calls for ``seconds`` from now; never shortens a pause."""
        with self._lock:
            self._until = max(self._until, self._clock.now() + seconds)

    async def passed(self) -> None:
        """Wait until there is no pause."""
        while (left := self.remaining) > 0:
            await self._clock.sleep(left)


def held_back(seconds: float, deadline: float) -> OverloadedError:
    """The error for a cooldown that lasts for ``seconds`` more, longer than ``deadline``."""
    return OverloadedError(
        f"calls are held back for {seconds:.1f} more seconds, longer than the deadline of "
        f"{deadline:g} seconds",
        retry_after=seconds,
    )


_cooldowns: weakref.WeakValueDictionary[tuple[str, str, str], Cooldown] = (
    weakref.WeakValueDictionary()
)
_cooldowns_lock = threading.Lock()


def secret_id(secret: str | None) -> str:
    """A name for a secret that does not give it away."""
    return hashlib.sha256(secret.encode()).hexdigest()[:16] if secret else ""


def cooldown_for(
    provider: str, key: str | None, model: str, clock: Clock = SYSTEM_CLOCK
) -> Cooldown:
    """The cooldown that all backends of this process share for these three.

    Args:
        provider: the provider's name, or a server's address.
        key: the API key; only a digest of it is kept.
        model: the model's name.
        clock: time, for the first that asks for it.
    """
    place = (provider, secret_id(key), model)
    with _cooldowns_lock:
        cooldown = _cooldowns.get(place)
        if cooldown is None:
            cooldown = _cooldowns[place] = Cooldown(clock)
        return cooldown


def is_retryable(error: BackendError) -> bool:
    """Whether the same call may succeed later: never for requests that are refused as bad."""
    if error.retryable:
        return True
    return type(error) is BackendError and error.status in _RETRYABLE_STATUS


def retry_after(headers: Mapping[str, str], clock: Clock = SYSTEM_CLOCK) -> float | None:
    """The seconds that a response asks to wait; None if it does not say.

    Args:
        headers: of the response, their names in any case.
        clock: for dates.
    """
    found = {name.lower(): value.strip() for name, value in headers.items()}
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _number(found.get(name, ""))
        if seconds is not None:
            return seconds * scale
    try:
        when = parsedate_to_datetime(found.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    return max(0.0, when.timestamp() - clock.wall())


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


class _Tries:
    """The state of one call over its tries."""

    def __init__(
        self,
        policy: RetryPolicy,
        cooldown: Cooldown | None,
        clock: Clock,
        on_retry: OnRetry | None,
        queued: Callable[[], float] | None,
        began: float,
    ) -> None:
        self._policy = policy
        self._cooldown = cooldown
        self._clock = clock
        self._on_retry = on_retry
        self._queued = queued
        self._retries = 0
        self._end = math.inf if policy.deadline is None else began + policy.deadline
        self._last: BackendError | None = None

    async def ready(self) -> None:
        """Wait for the cooldown; give up at once if it ends after the deadline."""
        if self._cooldown is None:
            return
        while (left := self._cooldown.remaining) > 0:
            if self._is_late(left):
                raise self._last or held_back(left, self._policy.deadline or 0.0)
            await self._clock.sleep(left)

    def _is_late(self, delay: float) -> bool:
        """Whether a try after ``delay`` seconds would begin after the deadline."""
        queued = 0.0 if self._queued is None else self._queued()
        return self._clock.now() + delay > self._end + queued

    async def failed(self, error: BackendError) -> None:
        """Wait before the next try, or raise ``error`` if there is none."""
        self._last = error
        delay = self._policy.delay(self._retries, error, self._clock)
        if isinstance(error, OverloadedError) and self._cooldown is not None:
            self._cooldown.pause(delay)
        last = self._retries >= self._policy.max_retries
        if last or not is_retryable(error) or self._is_late(delay):
            if self._retries:
                error.add_note(f"asyncsgl tried {self._retries + 1} times")
            raise error
        if self._on_retry is not None:
            self._on_retry(self._retries, error, delay)
        self._retries += 1
        await self._clock.sleep(delay)


async def retried(
    call: Callable[[], Awaitable[T]],
    policy: RetryPolicy,
    *,
    cooldown: Cooldown | None = None,
    clock: Clock = SYSTEM_CLOCK,
    on_retry: OnRetry | None = None,
    queued: Callable[[], float] | None = None,
) -> T:
    """The result of ``call``, which is called again after failures that may pass.

    Args:
        call: makes one try.
        policy: when to try again.
        cooldown: kept before each try, and set when the backend is overloaded.
        clock: time and chance.
        on_retry: told the retry's number, the error and the seconds before each retry.
        queued: seconds that the tries have waited for their turn here by now; the deadline
            moves by them.

    Raises:
        BackendError: that of the last try.
    """
    began = clock.now()
    tries: _Tries | None = None  # most calls succeed at once and need none
    while True:
        if cooldown is not None and cooldown.remaining > 0:
            tries = tries or _Tries(policy, cooldown, clock, on_retry, queued, began)
            await tries.ready()
        try:
            return await call()
        except BackendError as error:
            failure = error
        tries = tries or _Tries(policy, cooldown, clock, on_retry, queued, began)
        await tries.failed(failure)


async def retried_stream(
    call: Callable[[], AsyncGenerator[T, None]],
    policy: RetryPolicy,
    *,
    cooldown: Cooldown | None = None,
    clock: Clock = SYSTEM_CLOCK,
    on_retry: OnRetry | None = None,
    queued: Callable[[], float] | None = None,
) -> AsyncGenerator[T, None]:
    """The items of ``call``'s stream; it is called again only while none has come.

    Args and errors as for :func:`retried`; a stream that breaks after its first item raises.
    """
    tries = _Tries(policy, cooldown, clock, on_retry, queued, clock.now())
    while True:
        await tries.ready()
        begun = False
        try:
            async with aclosing(call()) as items:
                async for item in items:
                    begun = True
                    yield item
            return
        except BackendError as error:
            if begun and isinstance(error, OverloadedError) and cooldown is not None:
                cooldown.pause(policy.delay(0, error, clock))
            if begun:
                raise
            failure = error
        await tries.failed(failure)
