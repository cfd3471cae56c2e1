"""Backends around another one pass on what is not theirs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

import asyncsgl as sgl
from asyncsgl.backends.base import Backend
from asyncsgl.backends.cached import cached
from asyncsgl.program.prefix import SharedPrefix
from asyncsgl.testing import RecordingBackend, ScriptedBackend
from asyncsgl.types import Delta, GenRequest, Message, SamplingParams

pytestmark = pytest.mark.anyio


class Tended(ScriptedBackend):
    """Answers the utilities."""

    async def get_server_info(self) -> dict[str, object]:
        return {"version": "1"}

    async def flush_cache(self, *, wait: bool = False) -> bool:
        return wait

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        return f"{output_dir} {num_steps}"

    async def stop_profile(self) -> str:
        return "stopped"


@pytest.fixture(params=["recording", "shared prefix", "cached"])
def around(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Backend], Backend]:
    ways: dict[str, Callable[[Backend], Backend]] = {
        "recording": RecordingBackend,
        "shared prefix": SharedPrefix,
        "cached": lambda backend: cached(backend, tmp_path / "answers"),
    }
    return ways[request.param]


async def test_the_utilities_reach_the_backend(around: Callable[[Backend], Backend]) -> None:
    backend = around(Tended("x"))
    assert await sgl.get_server_info(backend) == {"version": "1"}
    assert await sgl.flush_cache(backend, wait=True) is True
    assert await sgl.flush_cache(backend) is False
    assert await sgl.start_profile(backend, output_dir="o", num_steps=2) == "o 2"
    assert await sgl.stop_profile(backend) == "stopped"


async def test_what_the_backend_lacks_is_refused(around: Callable[[Backend], Backend]) -> None:
    backend = around(ScriptedBackend("x"))
    with pytest.raises(sgl.UnsupportedFeature):
        await sgl.get_server_info(backend)
    with pytest.raises(sgl.UnsupportedFeature):
        await sgl.flush_cache(backend)


async def test_who_answers_and_how_is_the_backends(around: Callable[[Backend], Backend]) -> None:
    within = Tended("x")
    within.keeps_prefixes = True
    within.default_concurrency = 7
    backend = around(within)
    assert backend.identity == within.identity
    assert backend.capabilities == within.capabilities
    assert backend.default_concurrency == within.default_concurrency
    assert backend.keeps_prefixes == within.keeps_prefixes


class Watched(ScriptedBackend):
    """Tells whether its stream was closed."""

    closed = False

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        try:
            async with aclosing(super().stream(request)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self.closed = True


async def test_closing_a_stream_closes_the_backends(around: Callable[[Backend], Backend]) -> None:
    within = Watched("one two three")
    request = GenRequest((Message("user", ("hi",)),), SamplingParams(), "1", "hi")
    async with aclosing(around(within).stream(request)) as deltas:
        await anext(deltas)
        assert not within.closed
    assert within.closed
