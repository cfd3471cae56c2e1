"""The backends that programs are tested with."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.backends.base import FEATURES
from asyncsgl.testing import RecordingBackend, ScriptedBackend, last_text
from asyncsgl.types import Completion, GenRequest

pytestmark = pytest.mark.anyio


@sgl.function
async def ask(s: sgl.ProgramState, question: str = "q", n: int | None = None) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("x", n=n))


@sgl.function
async def twice(s: sgl.ProgramState) -> None:
    s += sgl.gen("x") + sgl.gen("y")


async def test_answers_by_text_completion_list_table_and_function() -> None:
    completion = Completion("c", "length", completion_tokens=1)
    assert (await ask.run(backend=ScriptedBackend("t")))["x"] == "t"
    assert (await ask.run(backend=ScriptedBackend(completion))).meta("x").finish_reason == "length"
    assert (await twice.run(backend=ScriptedBackend(["1", "2"]))).variables == {"x": "1", "y": "2"}
    table = ScriptedBackend({"sky": "blue", "grass": "green", "": "else"})
    for question, answer in (("the sky?", "blue"), ("grass?", "green"), ("what?", "else")):
        assert (await ask.run(question=question, backend=table))["x"] == answer

    async def slowly(request: GenRequest) -> str:
        await asyncio.sleep(0)
        return last_text(request) * 2

    assert (await ask.run(backend=ScriptedBackend(slowly)))["x"] == "qq"
    assert (await ask.run(backend=ScriptedBackend(lambda r: last_text(r) * 3)))["x"] == "qqq"


async def test_several_answers_of_one_call() -> None:
    assert (await ask.run(n=2, backend=ScriptedBackend("t")))["x"] == ["t", "t"]
    assert (await ask.run(n=2, backend=ScriptedBackend([["a", "b"]])))["x"] == ["a", "b"]
    assert (await ask.run(n=2, backend=ScriptedBackend(lambda _: ["a", "b"])))["x"] == ["a", "b"]
    with pytest.raises(sgl.InvalidArgument, match="3 answers for n=2"):
        await ask.run(n=2, backend=ScriptedBackend([["a", "b", "c"]]))


async def test_a_script_that_does_not_fit_says_so() -> None:
    with pytest.raises(sgl.InvalidArgument, match="has only 1 answers"):
        await twice.run(backend=ScriptedBackend(["1"]))
    with pytest.raises(sgl.InvalidArgument, match="no entry of the script fits 'q'"):
        await ask.run(backend=ScriptedBackend({"sky": "blue"}))
    with pytest.raises(sgl.InvalidArgument, match="chunk_size"):
        ScriptedBackend(chunk_size=0)


async def test_exceptions_are_raised() -> None:
    for answers in ([LookupError()], LookupError(), {"q": LookupError()}, lambda _: LookupError()):
        backend = ScriptedBackend(answers)
        with pytest.raises(LookupError):
            await ask.run(backend=backend)
        assert (backend.running, backend.cancelled) == (0, 0), "a failure is no cancellation"
        with pytest.raises(LookupError):
            async with ask.stream(backend=ScriptedBackend(LookupError())) as run:
                await run.result()


async def test_texts_are_cut_at_stops_and_length() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", stop=["!", "is"], max_tokens=9)
        s += sgl.gen("y", max_tokens=2)

    state = await program.run(backend=ScriptedBackend("this it is! all of it"))
    assert (state["x"], state.meta("x").matched_stop) == ("th", "is")
    assert (state["y"], state.meta("y").finish_reason) == ("this it", "length")


async def test_delays_and_pieces() -> None:
    backend = ScriptedBackend("abcde", delay=0.03, chunk_size=2, chunk_delay=0.01)
    began = time.perf_counter()
    async with ask.stream(backend=backend) as run:
        assert [piece async for piece in run.text("x")] == ["ab", "cd", "e"]
    assert time.perf_counter() - began >= 0.06


async def test_requests_are_recorded_and_counted() -> None:
    backend = ScriptedBackend("a", name="mine")
    await ask.run(backend=backend, temperature=0.5)
    await ask.run(question="r", backend=backend)
    assert [last_text(request) for request in backend.requests] == ["q", "r"]
    assert backend.requests[0].sampling.temperature == 0.5
    assert len({request.request_id for request in backend.requests}) == 2
    assert backend.statistics() == {"requests": 2, "running": 0, "cancelled": 0}
    assert repr(backend.name) == "'mine'"


async def test_a_closed_backend_refuses() -> None:
    async with ScriptedBackend("a") as backend:
        await ask.run(backend=backend)
    with pytest.raises(sgl.ClosedError, match="'scripted' is closed"):
        await ask.run(backend=backend)
    await backend.aclose()


async def test_recording_passes_on_and_the_script_replays(tmp_path: Any) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "go" + sgl.gen("x") + sgl.gen("y", n=2) + sgl.select("z", ["a", "b"])

    inner = ScriptedBackend(["1", ["2", "3"]], scores={"b": -1.0}, chunk_size=1)
    async with RecordingBackend(inner) as recording:
        first = await program.run(backend=recording)
        with pytest.raises(sgl.InvalidArgument, match="has only 2"):
            await ask.run(backend=recording)
    assert inner.statistics() == recording.statistics()
    assert [type(result).__name__ for _, result in recording.calls] == [
        "Generation",
        "Generation",
        "Scores",
        "InvalidArgument",
    ]
    replay = ScriptedBackend(recording.script(), scores={"b": -1.0})
    assert (await program.run(backend=replay)).variables == first.variables
    with pytest.raises(sgl.InvalidArgument):
        await ask.run(backend=replay)
    with pytest.raises(sgl.ClosedError):
        await ask.run(backend=inner)


async def test_recording_a_stream_and_one_that_is_left(tasks_left: Any) -> None:
    inner = ScriptedBackend("abc", chunk_size=1)
    recording = RecordingBackend(inner)
    async with ask.stream(backend=recording) as run:
        assert "".join([piece async for piece in run.text("x")]) == "abc"
    assert len(recording.calls) == 1
    async with ask.stream(backend=recording) as run:
        async for _ in run.text("x"):
            break
    assert (len(recording.calls), inner.cancelled, inner.running) == (1, 1, 0)
    assert not tasks_left()


async def test_recording_refuses_what_its_backend_refuses() -> None:
    can = sgl.Capabilities(frozenset(FEATURES) - {"n"})
    inner = ScriptedBackend("a", capabilities=can, chat_template=sgl.get_chat_template("claude"))
    recording = RecordingBackend(inner)
    with pytest.raises(sgl.UnsupportedFeature):
        await ask.run(n=2, backend=recording)
    assert (await ask.run(backend=recording)).text() == "\n\nHuman: q\n\nAssistant:a"
    assert (recording.capabilities, recording.name) == (can, "scripted")
