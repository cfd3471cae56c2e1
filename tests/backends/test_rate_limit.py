"""600 requests and 60,000 tokens in any minute: as good as all of it is used, and nothing refused.

Programs on whole backends, so that the estimates of tokens, their correction, the retry loop and
the limiter that backends share are all tested. First on a clock that jumps; then over sockets,
on one that runs ten times as fast (``soak``).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

import pytest

import asyncsgl as sgl
from asyncsgl.backends.base import Capabilities
from asyncsgl.backends.calls import Call, Piece, Reply
from asyncsgl.backends.openai import OpenAI
from asyncsgl.backends.planning import Profile
from asyncsgl.backends.provider import ProviderBackend
from asyncsgl.backends.retry import Clock
from asyncsgl.backends.settings import Settings
from asyncsgl.types import Completion, Usage
from tests.fakes.openai import KEY, FakeOpenAI
from tests.fakes.quota import JumpingTime, Quota

pytestmark = pytest.mark.anyio
RPM, TPM = 600, 60_000
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@sgl.function
async def ask(s: sgl.ProgramState, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=256))


def questions(count: int, seed: int) -> list[str]:
    """Questions of 5 to 60 words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(count)]


async def programs(backends: list[ProviderBackend], count: int) -> None:
    """One program for each backend, which asks ``count`` questions, all at once."""
    await asyncio.gather(
        *[
            ask.run(question=question, backend=backend)
            for number, backend in enumerate(backends)
            for question in questions(count, number)
        ]
    )


class Paced(ProviderBackend):
    """A model whose service has a quota, on the test's clock.

    Args:
        time: the clock.
        quota: of the service.
        answer: how many tokens its answers have, one after another.
    """

    def __init__(self, time: JumpingTime, quota: Quota, answer: Callable[[], int]) -> None:
        self.clock = time.clock
        super().__init__(
            "paced",
            "model",
            place=f"paced {id(quota)}",
            key="one key",
            settings=Settings(rpm=RPM, tpm=TPM, price=(0.0, 0.0), deadline=None),
            priced_as="",
            fixed={},
            chat_template=None,
        )
        self._quota = quota
        self._answer = answer

    @property
    def profile(self) -> Profile:
        """Chat, and nothing else."""
        native = frozenset({"chat", "max_tokens", "continue_assistant"})
        return Profile(Capabilities(native))

    async def prepare(self) -> None:
        """Takes five seconds: the calls that come meanwhile must not go out together then."""
        await self.clock.sleep(max(0.0, 5 - self.clock.now()))

    async def ask(self, call: Call) -> Reply:
        """An answer after a fifth of a second; a token has 3.1 characters here."""
        usage = Usage(round(call.size() / 3.1), self._answer(), requests=1)
        if seconds := self._quota.take(usage.total_tokens):
            raise sgl.RateLimitError("too many", retry_after=seconds)
        await self.clock.sleep(0.2)
        return Reply((Completion("word", "stop", completion_tokens=1),), usage)

    def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Nothing streams here."""
        raise NotImplementedError

    def translated(self, error: Exception) -> None:
        """There is no library below."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sharing", [1, 5], ids=["one program", "five programs"])
@pytest.mark.parametrize("longest", [30, 200], ids=["requests bind", "tokens bind"])
async def test_the_allowance_is_used_and_never_exceeded(sharing: int, longest: int) -> None:
    time = JumpingTime(settled=40)
    quota = Quota(RPM, TPM, lambda: time.now)
    chance = random.Random(1)
    backends: list[ProviderBackend] = [
        Paced(time, quota, lambda: chance.randint(10, longest)) for _ in range(sharing)
    ]
    assert len({id(backend.limiter) for backend in backends}) == 1
    await time.run(asyncio.create_task(programs(backends, 1500 // sharing)))
    assert len(quota.taken) == 1500
    assert quota.refused == []
    assert quota.share() >= 0.95
    assert {backend.limiter.running + backend.limiter.waiting for backend in backends} == {0}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sharing", [1, 5], ids=["one program", "five programs"])
async def test_a_key_that_others_have_used_up_is_refused_once(sharing: int) -> None:
    time = JumpingTime(settled=40)
    quota = Quota(RPM, TPM, lambda: time.now)
    quota.use(590, 50)
    backends: list[ProviderBackend] = [Paced(time, quota, lambda: 40) for _ in range(sharing)]
    await time.run(asyncio.create_task(programs(backends, 1000 // sharing)))
    assert quota.refused
    first = min(quota.refused)
    assert max(quota.refused) - first <= 0.2, "only calls that were under way were refused"
    after = [at for at, _ in quota.taken if at > first + 1]
    assert 60 * (len(after) - 1) / (after[-1] - after[0]) >= 0.95 * RPM


SPEED = 10.0


class Fast(OpenAI):
    """The backend, for which a real second is ten."""

    clock = Clock(
        now=lambda: time.monotonic() * SPEED, sleep=lambda seconds: asyncio.sleep(seconds / SPEED)
    )


@pytest.mark.soak
@pytest.mark.parametrize("sharing", [1, 5], ids=["one program", "five programs"])
async def test_over_sockets(sharing: int) -> None:
    chance = random.Random(2)
    async with FakeOpenAI(lambda _: " ".join(["word"] * chance.randint(5, 60))) as fake:
        fake.tick = 1 / SPEED
        fake.quota = quota = Quota(RPM, TPM, lambda: time.monotonic() * SPEED)
        async with AsyncExitStack() as stack:
            backends: list[ProviderBackend] = []
            for _ in range(sharing):
                url = f"{fake.url}/v1"
                backend = Fast("gpt-4o", base_url=url, api_key=KEY, rpm=RPM, tpm=TPM, deadline=None)
                backends.append(await stack.enter_async_context(backend))
            await programs(backends, 1500 // sharing)
    print(f"{len(quota.refused)} refused, {quota.share():.1%} used")
    assert len(quota.taken) == 1500
    assert quota.refused == []
    assert quota.share() >= 0.95
