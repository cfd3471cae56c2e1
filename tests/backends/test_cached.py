"""Answers kept on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

import asyncsgl as sgl
from asyncsgl.errors import InvalidArgument, OverloadedError
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Delta, GenRequest
from tests.fakes.service import PNG

pytestmark = pytest.mark.anyio


@sgl.function
async def ask(s: sgl.ProgramState, question: str = "Who?") -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=8))


async def test_the_same_request_is_asked_once(tmp_path: Path) -> None:
    inner = ScriptedBackend(["one", "two"])
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        first = await ask.run(backend=backend)
        again = await ask.run(backend=backend)
        assert first["answer"] == again["answer"] == "one"
        assert (first.usage.requests, again.usage.requests) == (1, 0)
        meta = again.meta("answer")
        assert isinstance(meta, sgl.Meta)
        assert meta.emulated == ("cached answer",)
        assert backend.statistics()["cache_hits"] == 1
    assert len(inner.requests) == 1


async def test_answers_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    async with sgl.cached(ScriptedBackend("kept"), path) as backend:
        await ask.run(backend=backend)
    second = ScriptedBackend("fresh")
    async with sgl.cached(second, path) as backend:
        assert (await ask.run(backend=backend))["answer"] == "kept"
    assert second.requests == []


async def test_all_that_changes_the_answer_counts(tmp_path: Path) -> None:
    @sgl.function
    async def look(s: sgl.ProgramState, data: bytes) -> None:
        s += sgl.user("What?" + sgl.image(data))
        s += sgl.assistant(sgl.gen("answer"))

    inner = ScriptedBackend("x")
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        await ask.run(backend=backend)
        await ask.run(backend=backend, question="What?")
        await ask.run(backend=backend, temperature=0.5)
        await ask.run(backend=backend, seed=1)
        await look.run(data=PNG, backend=backend)
        await look.run(data=PNG + b"\0", backend=backend)
    assert len(inner.requests) == 6
    other = ScriptedBackend("y", name="another")
    async with sgl.cached(other, tmp_path / "answers.db") as backend:
        assert (await ask.run(backend=backend))["answer"] == "y"


async def test_requests_that_come_together_are_asked_once(tmp_path: Path) -> None:
    inner = ScriptedBackend("one", delay=0.02)
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        states = await asyncio.gather(*[ask.run(backend=backend) for _ in range(8)])
    assert {state["answer"] for state in states} == {"one"}
    assert len(inner.requests) == 1


async def test_who_waited_asks_when_the_first_fails(tmp_path: Path) -> None:
    inner = ScriptedBackend([OverloadedError("busy"), "fine"], delay=0.02)
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        results = await asyncio.gather(
            ask.run(backend=backend), ask.run(backend=backend), return_exceptions=True
        )
    assert isinstance(results[0], OverloadedError)
    assert isinstance(results[1], sgl.State)
    assert results[1]["answer"] == "fine"


async def test_streams_are_kept_and_given_from_the_file(tmp_path: Path) -> None:
    inner = ScriptedBackend("one two", chunk_size=2)
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        for _ in range(2):
            async with ask.stream(backend=backend) as running:
                pieces = [piece async for piece in running.text("answer")]
            assert "".join(pieces) == "one two"
        assert (await ask.run(backend=backend))["answer"] == "one two"
    assert len(inner.requests) == 1


class Paused(ScriptedBackend):
    """Goes on after the first piece of a stream when it is told to."""

    def __init__(self, answer: str) -> None:
        super().__init__(answer, chunk_size=2)
        self.may_go_on = asyncio.Event()

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        async with aclosing(super().stream(request)) as deltas:
            async for delta in deltas:
                yield delta
                await self.may_go_on.wait()


async def read(
    backend: sgl.Backend, begun: asyncio.Semaphore | None = None
) -> tuple[list[str], sgl.State]:
    """A streamed answer; `begun` is released when its first piece is there."""
    pieces: list[str] = []
    async with ask.stream(backend=backend) as running:
        async for piece in running.text("answer"):
            if begun is not None and not pieces:
                begun.release()
            pieces.append(piece)
        return pieces, await running.result()


async def test_equal_streams_that_come_together_are_asked_once(tmp_path: Path) -> None:
    inner, begun = Paused("one two three"), asyncio.Semaphore(0)
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        readers = [asyncio.create_task(read(backend, begun)) for _ in range(4)]
        for _ in readers:
            await begun.acquire()
        whole = asyncio.create_task(ask.run(backend=backend))
        inner.may_go_on.set()
        read_states = await asyncio.gather(*readers)
        assert (await whole)["answer"] == "one two three"
        assert all(len(pieces) > 1 for pieces, _ in read_states), "they follow it as it comes"
        assert {"".join(pieces) for pieces, _ in read_states} == {"one two three"}
        assert sum(state.usage.requests for _, state in read_states) == 1
        assert backend.statistics()["cache_misses"] == 1
    assert len(inner.requests) == 1


async def test_a_stream_goes_on_while_one_reads_it(tmp_path: Path) -> None:
    inner = ScriptedBackend("one two three", chunk_size=2, delay=0.01)
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        second = asyncio.create_task(read(backend))
        async with ask.stream(backend=backend) as running:
            async for _ in running.text("answer"):
                break  # the first leaves
        pieces, _ = await second
        assert "".join(pieces) == "one two three"
    assert len(inner.requests) == 1


async def test_a_stream_that_nobody_reads_is_closed(tmp_path: Path) -> None:
    inner = ScriptedBackend(["one two three", "again"], chunk_size=2, delay=0.01)
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        async with ask.stream(backend=backend) as running:
            async for _ in running.text("answer"):
                break
        assert (await ask.run(backend=backend))["answer"] == "again", "half an answer is not kept"
        assert backend.statistics()["cache_misses"] == 2


async def test_who_follows_a_stream_asks_when_it_fails(tmp_path: Path) -> None:
    inner = ScriptedBackend([OverloadedError("busy"), "fine"], delay=0.02)
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        first, second = await asyncio.gather(read(backend), read(backend), return_exceptions=True)
    assert isinstance(first, OverloadedError)
    assert isinstance(second, tuple)
    assert second[0] == ["fine"]


async def test_choices_are_kept(tmp_path: Path) -> None:
    @sgl.function
    async def choose(s: sgl.ProgramState) -> None:
        s += "Is it? " + sgl.select("verdict", ["yes", "no"])

    inner = ScriptedBackend(scores={"no": -0.1})
    async with sgl.cached(inner, tmp_path / "answers.db") as backend:
        one = await choose.run(backend=backend)
        two = await choose.run(backend=backend)
    assert one["verdict"] == two["verdict"] == "no"
    assert one.meta("verdict").choice_scores == two.meta("verdict").choice_scores
    assert len(inner.requests) == 1


async def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("This is not a database, but some text that was here before. " * 40)
    async with sgl.cached(ScriptedBackend("x"), path) as backend:
        with pytest.raises(InvalidArgument, match=r"notes\.txt"):
            await ask.run(backend=backend)
    assert path.read_text().startswith("This is not")
