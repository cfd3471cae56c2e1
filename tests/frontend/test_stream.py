"""Streams: every event in order, text in pieces, any number of readers, at their own pace."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsgl as sgl
from asyncsgl import events
from asyncsgl.testing import ScriptedBackend, last_text
from asyncsgl.types import Completion, Delta, GenRequest, TokenLogprob
from tests.frontend.conftest import Left

pytestmark = pytest.mark.anyio


@sgl.function
async def one(s: sgl.ProgramState) -> str:
    s += sgl.user("q")
    s += sgl.assistant("So " + sgl.gen("x"))
    return "returned"


async def test_all_events_of_a_run_in_order() -> None:
    backend = ScriptedBackend("abc", chunk_size=2)
    async with one.stream(backend=backend) as run:
        seen = [event async for event in run]
        state = await run.result()
    [request] = backend.requests
    run_id = state.run_id
    assert seen == [
        events.RunStarted("one", run_id),
        events.Text((), None, "qSo "),
        events.VariableStarted((), "x", request, "scripted"),
        events.Text((), "x", "ab"),
        events.Text((), "x", "c"),
        events.VariableFinished((), "x", "abc", state.meta("x")),
        events.RunFinished("one", run_id),
    ]
    assert state.return_value == "returned"


@given(st.text(), st.integers(1, 5), st.integers(1, 3))
def test_the_pieces_joined_are_the_text(text: str, size: int, n: int) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", n=n)

    async def read() -> None:
        backend = ScriptedBackend(Completion(text), chunk_size=size)
        async with program.stream(backend=backend) as run:
            for index in range(n):
                pieces = [piece async for piece in run.text("x", index=index)]
                assert "".join(pieces) == text
                assert all(pieces)
            state = await run.result()
        assert state["x"] == ([text] * n if n > 1 else text)

    asyncio.run(read())


async def test_several_variables_and_the_programs_own_text() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "1" + sgl.gen("x") + "2" + sgl.gen("y") + "3"
        s += sgl.select("z", ["b", "c"])
        with s.var_scope("scope"):
            s += "in scope"
        s.set("w", "given")

    backend = ScriptedBackend(["first", "second"], chunk_size=1)
    async with program.stream(backend=backend) as run:
        y = "".join([piece async for piece in run.text("y")])
        x = "".join([piece async for piece in run.text("x")])
        z = [piece async for piece in run.text("z")]
        everything = "".join([piece async for piece in run.text()])
        assert [piece async for piece in run.text("scope")] == ["in scope"]
        assert [piece async for piece in run.text("w")] == ["given"]
        with pytest.raises(sgl.UnknownVariable, match="'q'"):
            [piece async for piece in run.text("q")]
    assert (x, y, z) == ("first", "second", ["b"])
    assert everything == "1first2second3bin scope" == (await run.result()).text()


async def test_branches_have_their_own_events() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "go "
        async with s.fork(2) as branches:
            branches += lambda i: f"{i}" + sgl.gen("x")
            async with branches[1].fork(1) as inner:
                inner += sgl.gen("deep")

    backend = ScriptedBackend(lambda request: last_text(request).upper(), chunk_size=2)
    async with program.stream(backend=backend) as run:
        seen = [event async for event in run]
        first = "".join([piece async for piece in run.text("x", branch=(0,))])
        second = "".join([piece async for piece in run.text("x", branch=(1,))])
        deep = "".join([piece async for piece in run.text("deep", branch=(1, 0))])
        with pytest.raises(sgl.UnknownVariable):
            [piece async for piece in run.text("x", branch=(7,))]
    assert (first, second, deep) == ("GO 0", "GO 1", "GO 1GO 1")
    started = [event.branch for event in seen if isinstance(event, events.BranchStarted)]
    finished = [event for event in seen if isinstance(event, events.BranchFinished)]
    assert sorted(started) == [(0,), (1,), (1, 0)]
    assert sorted(event.branch for event in finished) == [(0,), (1,), (1, 0)]
    assert all(event.error is None for event in finished)


async def test_logprobs_come_with_the_pieces() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", return_logprob=True)

    logprobs = (TokenLogprob(1, -0.5), TokenLogprob(2, -0.25))
    backend = ScriptedBackend(Completion("ab", logprobs=logprobs), chunk_size=1)
    async with program.stream(backend=backend) as run:
        texts = [event async for event in run if isinstance(event, events.Text)]
        state = await run.result()
    assert sum((text.logprobs for text in texts), ()) == logprobs == state.meta("x").logprobs


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("native", [False, True])
async def test_reasoning_is_split_off_while_it_streams(
    chunk_size: int | None, native: bool
) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.separate_reasoning("A: " + sgl.gen("x"), "deepseek-r1")

    if native:
        answer = Completion("so 4", reasoning="2+2 <is> 4")
    else:
        answer = Completion("2+2 <is> 4\n</think>\n\nso 4")
    backend = ScriptedBackend(answer, chunk_size=chunk_size)
    async with program.stream(backend=backend) as run:
        text = "".join([piece async for piece in run.text("x")])
        thoughts = "".join(
            [event.text async for event in run if isinstance(event, events.Reasoning)]
        )
        state = await run.result()
    assert (text, thoughts) == ("so 4", "2+2 <is> 4")
    assert (state["x"], state["x_reasoning_content"]) == (text, thoughts)
    assert state.text() == "A: so 4"


async def test_a_slow_reader_costs_the_text_and_not_its_pieces() -> None:
    text = "word " * 10_000
    backend = ScriptedBackend(text, chunk_size=1)

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x")

    async with program.stream(backend=backend) as run:
        reader = aiter(run)
        first = await anext(reader)
        await asyncio.sleep(0)
        tracemalloc.start()
        await run.result()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        rest = [event async for event in reader]
    assert isinstance(first, events.RunStarted)
    texts = [event for event in rest if isinstance(event, events.Text)]
    assert len(texts) < 10
    assert "".join(event.text for event in texts) == text
    assert held < 8 * len(text), f"{held / len(text):.1f} bytes a character"


async def test_readers_at_different_paces_see_the_same_text() -> None:
    backend = ScriptedBackend("abcdefghij" * 20, chunk_size=1)

    async def read(run: sgl.ProgramStream, turns: int) -> str:
        pieces = []
        async for piece in run.text("x"):
            pieces.append(piece)
            for _ in range(turns):
                await asyncio.sleep(0)
        return "".join(pieces)

    async with one.stream(backend=backend) as run:
        results = await asyncio.gather(*(read(run, turns) for turns in (0, 1, 5, 20)))
        late = await read(run, 0)
    assert set(results) == {"abcdefghij" * 20} == {late}


async def test_the_error_of_the_run_reaches_every_reader() -> None:
    error = sgl.OverloadedError("busy")

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x") + sgl.gen("y")

    async with program.stream(backend=ScriptedBackend(["fine", error])) as run:
        assert "".join([piece async for piece in run.text("x")]) == "fine"
        seen: list[Any] = []
        reads: list[Callable[[], Awaitable[object]]] = [
            lambda: collect(run.text("y"), []),
            lambda: collect(run.text(), []),
            lambda: collect(run, seen),
            run.result,
        ]
        for read in reads:
            with pytest.raises(sgl.OverloadedError) as caught:
                await read()
            assert caught.value is error
    assert isinstance(seen[-2], events.VariableFailed)
    assert seen[-2].error is error
    assert seen[-1] == events.RunFinished("program", error.state.run_id, error)  # type: ignore[attr-defined]


async def collect(source: Any, into: list[Any]) -> None:
    async for item in source:
        into.append(item)  # noqa: PERF401 - what was read before an error counts


async def test_the_error_of_a_tolerated_branch_reaches_its_reader() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        branches = s.fork(1)
        branches += sgl.gen("x")
        await branches.join(return_exceptions=True)

    async with program.stream(backend=ScriptedBackend(LookupError("no"))) as run:
        with pytest.raises(LookupError, match="no"):
            await collect(run.text("x", branch=(0,)), [])
        assert isinstance((await run.result())["x"][0], LookupError)


async def test_a_stream_that_ends_without_its_result_is_an_error() -> None:
    class Torn(ScriptedBackend):
        async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
            async for delta in super().stream(request):
                if delta.generation is None:
                    yield delta

    async with one.stream(backend=Torn("abc")) as run:
        with pytest.raises(sgl.TruncatedStreamError):
            await run.result()


async def test_a_stream_is_entered_first_and_once(tasks_left: Left) -> None:
    stream = one.stream(backend=ScriptedBackend("a"))
    uses: list[Callable[[], object]] = [lambda: aiter(stream), lambda: stream.text("x")]
    for use in uses:
        with pytest.raises(sgl.ClosedError, match="enter the stream first"):
            use()
    with pytest.raises(sgl.ClosedError, match="enter the stream first"):
        await stream.result()
    async with stream as run:
        with pytest.raises(sgl.ClosedError, match="entered before"):
            await run.__aenter__()
        await run.result()
    assert (await stream.result())["x"] == "a", "what is finished can be asked for afterwards"
    assert not tasks_left()


async def test_arguments_are_checked_before_the_stream_begins() -> None:
    with pytest.raises(sgl.InvalidArgument, match="unknown to one"):
        one.stream(backend=ScriptedBackend(), nonsense=1)
