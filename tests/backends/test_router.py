"""Several backends as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import get_args

import pytest

import asyncsgl as sgl
from asyncsgl.backends.base import Capabilities
from asyncsgl.backends.router import Policy
from asyncsgl.errors import (
    AuthenticationError,
    BadRequestError,
    BudgetExceeded,
    InvalidArgument,
    OverloadedError,
    UnsupportedFeature,
)
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Delta, GenRequest

pytestmark = pytest.mark.anyio


@sgl.function
async def ask(s: sgl.ProgramState) -> None:
    s += sgl.user("Who?")
    s += sgl.assistant(sgl.gen("answer", max_tokens=8))


class Breaking(ScriptedBackend):
    """Streams that break off after their first piece."""

    def __init__(self, error: Exception) -> None:
        super().__init__("one two", chunk_size=2)
        self._error = error

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        async with aclosing(super().stream(request)) as deltas:
            async for delta in deltas:
                yield delta
                raise self._error


def failing(error: Exception) -> ScriptedBackend:
    return ScriptedBackend(lambda _: error, name="failing")


@pytest.mark.parametrize("error", [OverloadedError("busy"), AuthenticationError("who?")])
async def test_the_next_answers_where_one_fails(error: Exception) -> None:
    first, second = failing(error), ScriptedBackend("me")
    router = sgl.Router([first, second])
    assert (await ask.run(backend=router))["answer"] == "me"
    async with ask.stream(backend=router) as running:
        assert [piece async for piece in running.text("answer")] == ["me"]
    assert len(first.requests) == len(second.requests) == 2
    assert router.statistics()["passed_on"] == 2


async def test_a_bad_request_is_bad_everywhere() -> None:
    second = ScriptedBackend("me")
    router = sgl.Router([failing(BadRequestError("no")), second])
    with pytest.raises(BadRequestError):
        await ask.run(backend=router)
    assert second.requests == []


async def test_the_last_failure_is_raised() -> None:
    router = sgl.Router([failing(OverloadedError("one")), failing(OverloadedError("two"))])
    with pytest.raises(OverloadedError, match="two"):
        await ask.run(backend=router)


@pytest.mark.parametrize("policy", ["round_robin", "least_busy"])
async def test_the_load_is_spread(policy: Policy) -> None:
    backends = [ScriptedBackend("me", delay=0.001) for _ in range(3)]
    router = sgl.Router(backends, policy=policy)
    await asyncio.gather(*[ask.run(backend=router) for _ in range(30)])
    assert [len(backend.requests) for backend in backends] == [10, 10, 10]


async def test_the_least_busy_gets_more() -> None:
    slow, quick = ScriptedBackend("me", delay=0.2), ScriptedBackend("me")
    router = sgl.Router([slow, quick], policy="least_busy")
    tasks: list[asyncio.Task[sgl.State]] = []
    for _ in range(4):
        tasks.append(asyncio.create_task(ask.run(backend=router)))
        await asyncio.wait(tasks[-1:], timeout=0.01)
    assert len(quick.requests) >= 3
    await asyncio.gather(*tasks)


async def test_what_one_cannot_do_goes_to_who_can() -> None:
    chat = Capabilities(native=frozenset({"chat", "max_tokens", "continue_assistant"}))
    poor, rich = ScriptedBackend("poor", capabilities=chat), ScriptedBackend("rich")
    router = sgl.Router([poor, rich])
    state = await ask.run(backend=router, top_k=3)
    assert state["answer"] == "rich"
    assert router.capabilities.support("top_k") == "emulated"
    assert router.capabilities.support("max_tokens") == "native"
    only_poor = sgl.Router([poor])
    with pytest.raises(UnsupportedFeature, match="top_k"):
        await ask.run(backend=only_poor, top_k=3)


@pytest.mark.parametrize("policy", get_args(Policy))
async def test_a_stream_that_has_begun_stays_where_it_is(policy: Policy) -> None:
    backends = [Breaking(OverloadedError("broke off")), Breaking(OverloadedError("broke off"))]
    router = sgl.Router(backends, policy=policy)
    async with ask.stream(backend=router) as running:
        with pytest.raises(OverloadedError, match="broke off"):
            _ = [piece async for piece in running.text("answer")]
    assert sum(len(backend.requests) for backend in backends) == 1
    assert router.statistics()["passed_on"] == 0
    assert router._running == [0, 0]


@pytest.mark.parametrize("policy", ["round_robin", "least_busy"])
async def test_streams_are_spread_and_passed_on(policy: Policy) -> None:
    backends = [failing(OverloadedError("busy")), ScriptedBackend("me"), ScriptedBackend("me")]
    router = sgl.Router(backends, policy=policy)
    for _ in range(6):
        async with ask.stream(backend=router) as running:
            assert [piece async for piece in running.text("answer")] == ["me"]
    assert min(len(backend.requests) for backend in backends) >= 2
    assert router.statistics()["passed_on"] == len(backends[0].requests)
    assert router._running == [0, 0, 0]


async def test_what_one_has_just_learned_not_to_take_goes_to_who_takes_it() -> None:
    error = UnsupportedFeature("first", "temperature")
    router = sgl.Router([failing(error), ScriptedBackend("me")])
    assert (await ask.run(backend=router))["answer"] == "me"
    async with ask.stream(backend=router) as running:
        assert [piece async for piece in running.text("answer")] == ["me"]


async def test_a_budget_that_is_spent_ends_the_run() -> None:
    second = ScriptedBackend("me")
    router = sgl.Router([failing(BudgetExceeded("no more")), second])
    with pytest.raises(BudgetExceeded):
        await ask.run(backend=router)
    assert second.requests == []


async def test_select_is_routed_too() -> None:
    @sgl.function
    async def choose(s: sgl.ProgramState) -> None:
        s += "Is it? " + sgl.select("verdict", ["yes", "no"])

    router = sgl.Router([ScriptedBackend(scores={"no": -0.1})])
    assert (await choose.run(backend=router))["verdict"] == "no"


class Serving(ScriptedBackend):
    """Has what a server has, and notes what it was asked for."""

    keeps_prefixes = True

    def __init__(self, name: str, *, busy: bool = False, error: Exception | None = None) -> None:
        super().__init__("x", name=name)
        self.asked: list[str] = []
        self._busy = busy
        self._error = error

    async def get_server_info(self) -> dict[str, object]:
        return {"model_path": self.name}

    async def flush_cache(self, *, wait: bool = False) -> bool:
        self.asked.append(f"flush_cache wait={wait}")
        if self._error is not None:
            raise self._error
        return not self._busy

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        if self._error is not None:
            raise self._error
        self.asked.append(f"start_profile {output_dir}")
        return f"{self.name} records"

    async def stop_profile(self) -> str:
        self.asked.append("stop_profile")
        return f"{self.name} is done"

    async def cache_prefix(self, request: GenRequest) -> None:
        self.asked.append(f"cache_prefix {request.text}")


async def test_utilities_reach_all_that_have_them() -> None:
    one, plain, two = Serving("one"), ScriptedBackend("x"), Serving("two")
    router = sgl.Router([one, plain, two], "round_robin")
    told = await sgl.get_server_info(router)
    assert told == {"backends": [{"model_path": "one"}, None, {"model_path": "two"}]}
    assert await sgl.flush_cache(router, wait=True) is True
    assert await sgl.start_profile(router, output_dir="/t") == "one records\ntwo records"
    assert await sgl.stop_profile(router) == "one is done\ntwo is done"
    await sgl.cache_prefix("Long", router)
    assert router.keeps_prefixes
    steps = ["flush_cache wait=True", "start_profile /t", "stop_profile", "cache_prefix Long"]
    assert one.asked == two.asked == steps


async def test_one_cache_that_is_in_use_is_told() -> None:
    one, two = Serving("one", busy=True), Serving("two")
    assert await sgl.flush_cache(sgl.Router([one, two])) is False
    assert two.asked == ["flush_cache wait=False"]


async def test_an_error_of_one_is_raised_after_all_were_asked() -> None:
    one, two = Serving("one", error=OverloadedError("busy")), Serving("two")
    router = sgl.Router([one, two])
    with pytest.raises(OverloadedError):
        await sgl.flush_cache(router)
    with pytest.raises(OverloadedError):
        await sgl.start_profile(router)
    assert two.asked == ["flush_cache wait=False", "start_profile None", "stop_profile"]


async def test_prompts_are_computed_ahead_where_calls_go() -> None:
    one, two = Serving("one"), Serving("two")
    await sgl.cache_prefix("Long", sgl.Router([one, two], "fallback"))
    assert (one.asked, two.asked) == (["cache_prefix Long"], [])


@pytest.mark.parametrize(
    "call", [sgl.get_server_info, sgl.flush_cache, sgl.start_profile, sgl.stop_profile]
)
async def test_what_none_has_is_refused(call: Callable[[sgl.Backend], Awaitable[object]]) -> None:
    router = sgl.Router([ScriptedBackend(), ScriptedBackend()])
    assert not router.keeps_prefixes
    with pytest.raises(UnsupportedFeature, match=f"router does not support {call.__name__}: none"):
        await call(router)


async def test_closing_it_closes_all() -> None:
    backends = [ScriptedBackend(), ScriptedBackend()]
    async with sgl.Router(backends):
        pass
    for backend in backends:
        with pytest.raises(sgl.ClosedError):
            await ask.run(backend=backend)


def test_a_router_needs_backends_and_a_policy() -> None:
    with pytest.raises(InvalidArgument, match="at least one"):
        sgl.Router([])
    with pytest.raises(InvalidArgument, match="policy"):
        sgl.Router([ScriptedBackend()], policy="best")  # type: ignore[arg-type]


class Unclosable(ScriptedBackend):
    """Cannot be closed."""

    async def aclose(self) -> None:
        raise OSError("still in use")


async def test_all_backends_are_closed_where_one_cannot_be() -> None:
    last = ScriptedBackend("one")
    with pytest.raises(OSError, match="still in use"):
        await sgl.Router([Unclosable("one"), last]).aclose()
    with pytest.raises(sgl.ClosedError):
        await ask.run(backend=last)
