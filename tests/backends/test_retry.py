"""The retry loop: what is tried again, when, how often, and what is shared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from email.utils import formatdate

import pytest

from asyncsgl.backends.retry import (
    Clock,
    Cooldown,
    RetryPolicy,
    cooldown_for,
    is_retryable,
    retried,
    retried_stream,
    retry_after,
)
from asyncsgl.errors import (
    AuthenticationError,
    BackendConnectionError,
    BackendError,
    BackendTimeout,
    BadRequestError,
    ContentFilterError,
    ContextLengthError,
    InvalidArgument,
    NotFoundError,
    OverloadedError,
    RateLimitError,
    TruncatedStreamError,
)

pytestmark = pytest.mark.anyio


class FakeTime:
    """A clock that jumps as far as is slept, and chance that is always the same."""

    def __init__(self, chance: float = 0.5) -> None:
        self.time = 1000.0
        self.slept: list[float] = []
        self.clock = Clock(lambda: self.time, self.sleep, lambda: chance, lambda: self.time)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.slept.append(seconds)
        self.time += seconds


class Flaky:
    """Fails with each of ``errors`` in order, then gives ``"done"``."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def stream(self) -> AsyncGenerator[str, None]:
        yield await self()


RETRIED: list[BackendError] = [
    RateLimitError("slow down", status=429),
    OverloadedError("busy", status=529),
    BackendTimeout("late"),
    BackendConnectionError("reset"),
    TruncatedStreamError("cut"),
    BackendError("oops", status=500),
    BackendError("conflict", status=409),
]
FINAL: list[BackendError] = [
    BadRequestError("bad", status=400),
    ContextLengthError("long", status=400),
    AuthenticationError("who", status=401),
    NotFoundError("what", status=404),
    ContentFilterError("no", status=400),
    BackendError("no money left", status=429),
    BackendError("odd"),
]


@pytest.mark.parametrize("error", RETRIED, ids=repr)
async def test_what_may_pass_is_tried_again(error: BackendError) -> None:
    call, time = Flaky(error), FakeTime()
    assert is_retryable(error)
    assert await retried(call, RetryPolicy(), clock=time.clock) == "done"
    assert call.calls == 2


@pytest.mark.parametrize("error", FINAL, ids=repr)
async def test_what_cannot_pass_is_raised_at_once(error: BackendError) -> None:
    call, time = Flaky(error), FakeTime()
    with pytest.raises(BackendError) as caught:
        await retried(call, RetryPolicy(), clock=time.clock)
    assert caught.value is error
    assert (call.calls, time.slept) == (1, [])


async def test_the_waits_double_up_to_a_ceiling() -> None:
    time = FakeTime(chance=1.0)
    call = Flaky(*[BackendTimeout("late") for _ in range(5)])
    policy = RetryPolicy(max_retries=5, first_delay=1, max_delay=5)
    await retried(call, policy, clock=time.clock)
    assert time.slept == [1, 2, 4, 5, 5]


async def test_no_more_tries_than_allowed_and_the_error_says_how_many() -> None:
    call, time = Flaky(*[BackendTimeout("late") for _ in range(9)]), FakeTime()
    with pytest.raises(BackendTimeout) as caught:
        await retried(call, RetryPolicy(max_retries=3), clock=time.clock)
    assert call.calls == 4
    assert caught.value.__notes__ == ["asyncsgl tried 4 times"]


async def test_retry_after_is_kept_and_hardly_exceeded() -> None:
    time = FakeTime(chance=1.0)
    await retried(Flaky(RateLimitError("slow", retry_after=20)), RetryPolicy(), clock=time.clock)
    assert 20 <= time.slept[0] <= 22.1


async def test_the_deadline_ends_the_tries_before_a_wait_that_passes_it() -> None:
    call, time = Flaky(RateLimitError("slow", retry_after=120)), FakeTime()
    with pytest.raises(RateLimitError):
        await retried(call, RetryPolicy(deadline=60), clock=time.clock)
    assert (call.calls, time.slept) == (1, [])


async def test_waiting_for_its_turn_does_not_bring_the_deadline_nearer() -> None:
    time = FakeTime()
    waited = 0.0

    async def call() -> str:
        nonlocal waited
        waited += 1000.0
        await time.clock.sleep(1000.0)
        if waited < 3000:
            raise OverloadedError("busy", retry_after=1)
        return "fine"

    policy = RetryPolicy(deadline=10)
    assert await retried(call, policy, clock=time.clock, queued=lambda: waited) == "fine"
    waited = 0.0
    with pytest.raises(OverloadedError):
        await retried(call, policy, clock=time.clock)


async def test_an_overload_holds_back_every_call_that_shares_the_cooldown() -> None:
    time = FakeTime(chance=0.0)
    shared = Cooldown(time.clock)
    refused = Flaky(RateLimitError("slow", retry_after=30))
    with pytest.raises(RateLimitError):
        await retried(refused, RetryPolicy(max_retries=0), cooldown=shared, clock=time.clock)
    assert shared.remaining == 30
    began: list[float] = []

    async def other() -> None:
        began.append(time.time)

    await retried(other, RetryPolicy(), cooldown=shared, clock=time.clock)
    assert began == [1030]


async def test_a_cooldown_beyond_the_deadline_fails_before_calling() -> None:
    time = FakeTime()
    shared = Cooldown(time.clock)
    shared.pause(100)
    call = Flaky()
    with pytest.raises(OverloadedError, match="held back"):
        await retried(call, RetryPolicy(deadline=10), cooldown=shared, clock=time.clock)
    assert call.calls == 0


async def test_only_overload_sets_the_cooldown() -> None:
    time = FakeTime()
    shared = Cooldown(time.clock)
    await retried(Flaky(BackendTimeout("late")), RetryPolicy(), cooldown=shared, clock=time.clock)
    assert shared.remaining == 0


def test_a_cooldown_is_one_for_provider_key_and_model() -> None:
    first = cooldown_for("p", "secret", "m")
    assert cooldown_for("p", "secret", "m") is first
    assert cooldown_for("p", "other", "m") is not first
    assert cooldown_for("p", "secret", "n") is not first
    assert cooldown_for("q", "secret", "m") is not first


async def test_a_stream_is_tried_again_only_before_its_first_item() -> None:
    time = FakeTime()
    early = Flaky(BackendTimeout("late"))
    got = [item async for item in retried_stream(early.stream, RetryPolicy(), clock=time.clock)]
    assert got == ["done"]

    async def breaks() -> AsyncGenerator[str, None]:
        yield "half"
        raise BackendConnectionError("reset")

    async with aclosing(retried_stream(breaks, RetryPolicy(), clock=time.clock)) as items:
        assert await anext(items) == "half"
        with pytest.raises(BackendConnectionError):
            await anext(items)
    assert time.slept == time.slept[:1]


async def test_closing_a_retried_stream_closes_the_stream_inside() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    async with aclosing(retried_stream(endless, RetryPolicy())) as items:
        assert await anext(items) == 1
    assert closed == [True]


async def test_the_back_off_can_be_cancelled() -> None:
    call = Flaky(RateLimitError("slow", retry_after=3600))
    waiting = asyncio.Event()
    policy = RetryPolicy(deadline=None)
    task = asyncio.create_task(retried(call, policy, on_retry=lambda *_: waiting.set()))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"Retry-After": formatdate(1030, usegmt=True)}, 30.0),
        ({"Retry-After": formatdate(10, usegmt=True)}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_each_of_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, FakeTime().clock) == seconds


def test_a_policy_refuses_what_has_no_meaning() -> None:
    with pytest.raises(InvalidArgument, match="max_retries"):
        RetryPolicy(max_retries=-1)
    with pytest.raises(InvalidArgument, match="deadline"):
        RetryPolicy(deadline=0)
