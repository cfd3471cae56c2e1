"""What the prompts of a batch share is computed once, before the batch spreads out."""

from __future__ import annotations

import asyncio

import pytest

import asyncsgl as sgl
from asyncsgl.backends.base import FEATURES, Capabilities
from asyncsgl.testing import ScriptedBackend, last_text
from asyncsgl.types import GenRequest

pytestmark = pytest.mark.anyio

TEXT = Capabilities(native=frozenset(FEATURES), wants_text=True)


class Caching(ScriptedBackend):
    """A backend that keeps prefixes, and notes in which order it is asked."""

    keeps_prefixes = True

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__("answer", capabilities=TEXT)
        self.order: list[str] = []
        self.refuses = refuses

    async def generate(self, request: GenRequest) -> sgl.types.Generation:
        self.order.append("generate")
        return await super().generate(request)

    async def cache_prefix(self, request: GenRequest) -> None:
        self.order.append("cache")
        await asyncio.sleep(0)
        if self.refuses:
            raise sgl.OverloadedError("busy")
        await super().cache_prefix(request)


@sgl.function
async def ask(s: sgl.ProgramState, start: str, question: str) -> None:
    s += start + question
    s += sgl.gen("answer")


def rows(start: str, count: int) -> list[dict[str, str]]:
    return [{"start": start, "question": f"{number}?"} for number in range(count)]


async def test_a_long_common_beginning_is_computed_before_the_rest() -> None:
    backend = Caching()
    await ask.run_batch(rows("common " * 100, 20), backend=backend, num_threads=10)
    assert backend.order == ["generate", "cache", *["generate"] * 19]
    [ahead] = [request for request in backend.requests if request.request_id.startswith("prefix")]
    assert last_text(ahead) == ahead.text == "common " * 100


async def test_short_or_no_common_beginnings_are_left_alone() -> None:
    backend = Caching()
    await ask.run_batch(rows("brief ", 5), backend=backend)
    await ask.run_batch(
        [{"start": str(number) * 600, "question": "?"} for number in range(5)], backend=backend
    )
    assert backend.order == ["generate"] * 10


async def test_a_failing_computation_ahead_fails_nothing() -> None:
    backend = Caching(refuses=True)
    states = await ask.run_batch(rows("common " * 100, 3), backend=backend)
    assert [state["answer"] for state in states] == ["answer"] * 3


async def test_one_run_at_a_time_needs_no_computing_ahead() -> None:
    backend = Caching()
    await ask.run_batch(rows("common " * 100, 3), backend=backend, num_threads=1)
    assert backend.order == ["generate"] * 3


async def test_streams_and_choices_wait_their_turn_too() -> None:
    @sgl.function
    async def pick(s: sgl.ProgramState, question: str) -> None:
        s += "common " * 100 + question
        s += sgl.select("answer", ["a", "b"])

    backend = Caching()
    states = await pick.run_batch([{"question": str(n)} for n in range(3)], backend=backend)
    assert [state["answer"] for state in states] == ["a"] * 3
    assert backend.order == ["cache"]
