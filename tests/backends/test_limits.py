"""Limits a minute, calls at once, and budgets, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from asyncsgl.backends.budget import Budget, known_price, price_per_million
from asyncsgl.backends.calls import Call
from asyncsgl.backends.estimates import Estimates
from asyncsgl.backends.limits import Limiter
from asyncsgl.backends.retry import RetryPolicy, retried
from asyncsgl.errors import BudgetExceeded, InvalidArgument, OverloadedError, RateLimitError
from asyncsgl.types import Message, SamplingParams, Usage
from tests.fakes.quota import JumpingTime, Quota

pytestmark = pytest.mark.anyio


class Service:
    """Allows so much in any minute, and refuses what is above."""

    def __init__(self, time: JumpingTime, rpm: int, tpm: int, latency: float = 0.2) -> None:
        self.time = time
        self.latency = latency
        self.quota = Quota(rpm, tpm, lambda: time.now)
        self.done: list[float] = []

    async def call(self, tokens: int) -> Usage:
        if seconds := self.quota.take(tokens):
            raise RateLimitError("too many", retry_after=seconds)
        await self.time.sleep(self.latency)
        self.done.append(self.time.now)
        return Usage(tokens // 2, tokens - tokens // 2, requests=1)


async def work(
    time: JumpingTime, service: Service, limiter: Limiter, calls: int, tokens: Callable[[int], int]
) -> None:
    """``calls`` calls at once, each with the retry loop and the cooldown, as backends do."""
    cooldown = limiter.cooldown

    async def one(number: int) -> None:
        async def once() -> None:
            async with limiter.admitted(100.0) as ticket:
                ticket.settle(await service.call(tokens(number)))

        policy = RetryPolicy(max_retries=50, deadline=None)
        await retried(once, policy, cooldown=cooldown, clock=time.clock)

    await asyncio.gather(*[one(number) for number in range(calls)])


@pytest.mark.timeout(60)
async def test_the_allowance_is_used_and_not_exceeded() -> None:
    time = JumpingTime()
    service = Service(time, rpm=600, tpm=60_000)
    limiter = Limiter(rpm=600, tpm=60_000, clock=time.clock)
    sizes = [60, 80, 90, 100, 120]  # 90 tokens on average: requests are the bound
    task = asyncio.create_task(work(time, service, limiter, 2400, lambda n: sizes[n % 5]))
    await time.run(task)
    assert service.quota.refused == []
    assert 2400 / (service.done[-1] / 60) >= 0.95 * 600
    assert limiter.running == limiter.waiting == 0


@pytest.mark.timeout(60)
async def test_tokens_can_be_the_bound() -> None:
    time = JumpingTime()
    service = Service(time, rpm=6000, tpm=60_000)
    limiter = Limiter(rpm=6000, tpm=60_000, clock=time.clock)
    task = asyncio.create_task(work(time, service, limiter, 1200, lambda _: 200))
    await time.run(task)
    assert service.quota.refused == [], "what was underestimated is made up for"
    used = 1200 * 200 / (service.done[-1] / 60)
    assert used >= 0.95 * 60_000


@pytest.mark.timeout(60)
async def test_nothing_is_refused_after_the_first_cooldown() -> None:
    time = JumpingTime()
    service = Service(time, rpm=600, tpm=60_000)
    service.quota.use(550, 10)  # somebody else has used the key
    limiter = Limiter(rpm=600, tpm=60_000, clock=time.clock)
    task = asyncio.create_task(work(time, service, limiter, 900, lambda _: 60))
    await time.run(task)
    assert service.quota.refused
    assert max(service.quota.refused) - min(service.quota.refused) <= service.latency


def test_estimates_follow_what_calls_cost_and_not_what_choices_do() -> None:
    def call(max_tokens: int) -> Call:
        return Call((Message("user", ("word " * 100,)),), SamplingParams(), max_tokens, "gen-1")

    estimates = Estimates()
    gen = call(256)
    assert estimates.most(gen) == Usage(166, 256)
    assert estimates.likely(gen, estimates.most(gen)) == 125 + 256
    for _ in range(100):
        estimates.correct(gen, Usage(100, 50, requests=1))
        estimates.correct(call(1), Usage(100, 0, requests=1))
    assert estimates.likely(gen, estimates.most(gen)) == pytest.approx(100 + 1.2 * 50 + 8, abs=1)
    assert estimates.likely(call(1), estimates.most(call(1))) == pytest.approx(101, abs=1)


async def test_first_come_first_served() -> None:
    time = JumpingTime()
    limiter = Limiter(rpm=60, clock=time.clock)
    order: list[int] = []

    async def one(number: int) -> None:
        async with limiter.admitted():
            order.append(number)

    async def all_of_them() -> None:
        await asyncio.gather(*[one(number) for number in range(30)])

    await time.run(asyncio.create_task(all_of_them()))
    assert order == list(range(30))


async def test_only_so_many_at_once() -> None:
    limiter = Limiter(concurrency=3)
    most = 0

    async def one() -> None:
        nonlocal most
        async with limiter.admitted():
            most = max(most, limiter.running)
            await asyncio.sleep(0)

    await asyncio.gather(*[one() for _ in range(20)])
    assert most == 3
    assert limiter.running == limiter.waiting == 0


async def test_who_gives_up_waiting_holds_nobody_up() -> None:
    limiter = Limiter(concurrency=1)

    async def one() -> None:
        async with limiter.admitted():
            await asyncio.sleep(0)

    async with limiter.admitted():
        waiting = [asyncio.create_task(one()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert limiter.waiting == 2
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, False, False]
    assert limiter.running == 0


async def test_the_number_at_once_follows_the_service() -> None:
    limiter = Limiter(concurrency="auto")
    begun = limiter.concurrency

    async def one() -> None:
        async with limiter.admitted() as ticket:
            await asyncio.sleep(0)
            ticket.settle(Usage(1, 1))

    for _ in range(200):
        await one()
    assert limiter.concurrency == begun, "one call at a time proves nothing about many"
    await asyncio.gather(*[one() for _ in range(200)])
    grown = limiter.concurrency
    assert grown > begun
    async with limiter.admitted() as first, limiter.admitted() as other:
        first.refuse()
        other.refuse()
    once = limiter.concurrency
    assert grown * 0.6 < once < grown, "one decrease for what was refused together"


def test_limits_that_mean_nothing_are_refused() -> None:
    for name, value in (("rpm", 0), ("tpm", -1), ("concurrency", 0), ("concurrency", "much")):
        with pytest.raises(InvalidArgument, match=name):
            Limiter(**{name: value})  # type: ignore[arg-type]


async def test_a_cooldown_beyond_the_patience_ends_the_waiting() -> None:
    time = JumpingTime()
    limiter = Limiter(rpm=60, clock=time.clock)
    refused: list[float | None] = []

    async def one() -> None:
        try:
            limiter.leave(await limiter.enter(patience=100))
        except OverloadedError as error:
            refused.append(error.retry_after)

    async def all_of_them() -> None:
        waiting = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0)
        limiter.cooldown.pause(50)
        await asyncio.wait(waiting[:2])
        limiter.cooldown.pause(500)
        await asyncio.wait(waiting)

    await time.run(asyncio.create_task(all_of_them()))
    assert refused == pytest.approx([500.0] * 3, abs=2)
    assert limiter.running == limiter.waiting == 0


async def test_a_limiter_serves_several_loops() -> None:
    limiter = Limiter(concurrency=1)
    running: list[int] = []

    async def one() -> None:
        async with limiter.admitted():
            running.append(limiter.running)
            await asyncio.sleep(0.001)

    async def many() -> None:
        await asyncio.gather(*[one() for _ in range(10)])

    await asyncio.gather(*[asyncio.to_thread(asyncio.run, many()) for _ in range(3)], many())
    assert running == [1] * 40


async def test_a_budget_refuses_before_it_is_passed() -> None:
    budget = Budget(price_per_million(1.0, 2.0), lambda: None, 0.001, None)
    await budget.ready()
    hold = budget.hold(Usage(100, 400))  # 0.0009 dollars at most
    with pytest.raises(BudgetExceeded, match="max_cost"):
        budget.hold(Usage(100, 100))
    budget.settle(hold, Usage(100, 50, requests=1))
    assert budget.cost == pytest.approx(0.0002)
    budget.settle(budget.hold(Usage(100, 100)), None)
    assert budget.cost == pytest.approx(0.0002), "a call that failed costs nothing"


async def test_a_budget_of_tokens() -> None:
    budget = Budget(None, lambda: None, None, 100)
    await budget.ready()
    budget.settle(budget.hold(Usage(40, 50)), Usage(40, 40))
    with pytest.raises(BudgetExceeded, match="max_tokens_total"):
        budget.hold(Usage(10, 20))
    assert budget.cost is None, "an unknown price is not nothing"


@pytest.mark.parametrize("prompt", [1000, 300_000])
def test_prices_are_those_of_the_table_for_each_kind_of_token(prompt: int) -> None:
    genai_prices = pytest.importorskip("genai_prices")
    price = known_price("anthropic", "claude-sonnet-5")
    assert price is not None
    usage = Usage(prompt, 200, cached_tokens=prompt // 2, cache_write_tokens=prompt // 4)
    table = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=prompt,
            output_tokens=200,
            cache_read_tokens=prompt // 2,
            cache_write_tokens=prompt // 4,
        ),
        model_ref="claude-sonnet-5",
        provider_id="anthropic",
    )
    assert price(usage) == pytest.approx(float(table.total_price))
    assert price(Usage(prompt, cache_write_tokens=prompt)) > price(Usage(prompt))


async def test_writing_to_a_cache_is_set_aside_for() -> None:
    price = known_price("anthropic", "claude-sonnet-5")
    if price is None:
        pytest.skip("genai-prices is not installed")
    budget = Budget(price, lambda: None, 1.1 * price(Usage(1000)), None)
    with pytest.raises(BudgetExceeded):
        budget.hold(Usage(1000))


async def test_a_bound_on_the_cost_needs_a_price() -> None:
    budget = Budget(None, lambda: None, 1.0, None)
    with pytest.raises(InvalidArgument, match="price"):
        await budget.ready()
