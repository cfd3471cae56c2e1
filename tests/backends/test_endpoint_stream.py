"""Streams of SGLang servers, whichever way they are cut and however they end."""

from __future__ import annotations

import itertools
import json
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsgl as sgl
from asyncsgl import RuntimeEndpoint
from asyncsgl.backends.endpoint_stream import StreamAssembly
from asyncsgl.program.prefix import prefix_request
from asyncsgl.testing_server import Abort, Cut, Drop, FakeServer, Fault, Refuse, Say, StreamError
from asyncsgl.testing_server.model import Asked, FakeModel
from asyncsgl.testing_server.server import Packets
from asyncsgl.types import Delta, Generation, SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("http_library")]

TEXT = "Äpfel, 梨 and 🍐🍐 ha ha ha haha ünd so on."


def request(**sampling: Any) -> sgl.GenRequest:
    return replace(prefix_request("Say it"), sampling=SamplingParams(**sampling))


async def streamed(backend: sgl.Backend, asked: sgl.GenRequest) -> tuple[list[Delta], Generation]:
    """The deltas before the last, and the generation that the last has."""
    async with aclosing(backend.stream(asked)) as stream:
        *deltas, last = [delta async for delta in stream]
    assert last.generation is not None
    assert all(delta.generation is None for delta in deltas)
    return deltas, last.generation


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("token_ids", [True, False])
@pytest.mark.parametrize("packets", ["events", "pairs", 1, 7, 100_000])
async def test_any_cut_gives_the_same_text(
    incremental: bool, token_ids: bool, packets: Packets
) -> None:
    text = TEXT if token_ids else TEXT.replace(" ha ha ha haha", "")
    server = FakeServer(text, incremental=incremental, token_ids=token_ids, packets=packets)
    async with server, RuntimeEndpoint(server.url) as there:
        deltas, generation = await streamed(there, request())
    assert "".join(delta.text for delta in deltas) == text
    assert generation.completions[0].text == text
    assert len(deltas) > 5
    assert generation.timings.first_token is not None
    assert generation.timings.first_token <= generation.timings.total


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("space", [True, False])
async def test_forms_of_lines(end: str, space: bool) -> None:
    async with (
        FakeServer(TEXT, line_end=end, space=space) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        _, generation = await streamed(there, request())
    assert generation.completions[0].text == TEXT


async def test_a_stream_whose_answer_is_whole_may_lack_its_marker() -> None:
    async with FakeServer(TEXT, done=False) as server, RuntimeEndpoint(server.url) as there:
        _, generation = await streamed(there, request())
    assert generation.completions[0].text == TEXT


async def test_a_stream_that_ends_early_is_an_error() -> None:
    async with (
        FakeServer(TEXT, faults=[Cut(after=3)]) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        with pytest.raises(sgl.TruncatedStreamError) as caught:
            await streamed(there, request())
    assert caught.value.request_id == server.generates()[0]["rid"]
    assert len(server.generates()) == 1  # text had come: it is not asked for again


async def test_an_empty_stream_is_asked_for_again() -> None:
    async with FakeServer(TEXT, faults=[Cut(0)]) as server, RuntimeEndpoint(server.url) as there:
        _, generation = await streamed(there, request())
    assert generation.completions[0].text == TEXT
    first, second = (body["rid"] for body in server.generates())
    assert first != second


async def test_a_broken_connection_is_an_error() -> None:
    deltas: list[Delta] = []

    async def read(there: RuntimeEndpoint) -> None:
        async for delta in there.stream(request()):
            deltas.append(delta)  # noqa: PERF401 - what came before the error counts

    faults = [Drop(after=3)]
    async with FakeServer(TEXT, faults=faults) as server, RuntimeEndpoint(server.url) as there:
        with pytest.raises(sgl.BackendConnectionError):
            await read(there)
    assert len(deltas) == 3


@pytest.mark.parametrize(
    ("fault", "error", "retried"),
    [
        (StreamError("no such token", 400), sgl.BadRequestError, False),
        (StreamError("no such token", 400, after=2), sgl.BadRequestError, False),
        (StreamError("the scheduler fell over", 500, after=2), sgl.BackendError, False),
        (Abort(503, "The request queue is full."), None, True),
        (Abort(503, "preempted", after=2), sgl.OverloadedError, False),
        (Abort(400, "too long for the context length", after=1), sgl.ContextLengthError, False),
        (Abort(None), sgl.BackendError, False),
        (Refuse(503, {"object": "error", "message": "full", "code": 503}), None, True),
        (Refuse(400, {"error": "unexpected keyword argument 'x'"}), sgl.BadRequestError, False),
        (Say(b"data: {nonsense\n\n"), sgl.BackendError, False),
        (Say(b'data: {"text": 7}\n\n'), sgl.BackendError, False),
    ],
)
async def test_errors_in_a_stream(
    fault: Fault, error: type[sgl.BackendError] | None, retried: bool
) -> None:
    async with FakeServer(TEXT, faults=[fault]) as server, RuntimeEndpoint(server.url) as there:
        if error is None:
            _, generation = await streamed(there, request())
            assert generation.completions[0].text == TEXT
        else:
            with pytest.raises(error) as caught:
                await streamed(there, request())
            assert caught.value.backend == "endpoint"
            assert caught.value.request_id == server.generates()[0]["rid"]
    assert len(server.generates()) == (2 if retried else 1)


@pytest.mark.parametrize("incremental", [False, True])
async def test_several_answers_come_interleaved(incremental: bool) -> None:
    texts = ["one of them", "and another one", "last"]
    server = FakeServer(texts, incremental=incremental)
    async with server, RuntimeEndpoint(server.url) as there:
        deltas, generation = await streamed(there, request(n=3))
    assert [answer.text for answer in generation.completions] == texts
    for index, text in enumerate(texts):
        assert "".join(delta.text for delta in deltas if delta.index == index) == text
    assert [delta.index for delta in deltas[:4]] == [0, 1, 2, 0]


@pytest.mark.parametrize("incremental", [False, True])
async def test_logprobs_come_once(incremental: bool) -> None:
    model = FakeModel("a b c", logprob=lambda before, _: -float(len(before)))
    server = FakeServer(model=model, incremental=incremental)
    async with server, RuntimeEndpoint(server.url) as there:
        deltas, generation = await streamed(
            there, request(return_logprob=True, logprob_start_len=0, top_logprobs_num=1)
        )
        plain = await there.generate(
            request(return_logprob=True, logprob_start_len=0, top_logprobs_num=1)
        )
    each = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.logprob for entry in each] == [-2.0, -3.0, -4.0]
    assert generation.completions == plain.completions
    assert tuple(each) == plain.completions[0].logprobs


async def test_the_connection_is_used_again_after_a_stream() -> None:
    async with FakeServer(TEXT) as server, RuntimeEndpoint(server.url) as there:
        for _ in range(5):
            await streamed(there, request())
        assert server.accepted == 1


async def test_leaving_a_stream_ends_it_at_the_server() -> None:
    async with FakeServer(TEXT, delay=0.01) as server, RuntimeEndpoint(server.url) as there:
        async with aclosing(there.stream(request())) as stream:
            async for _ in stream:
                break
        assert server.aborted == [server.generates()[0]["rid"]]
        assert server.running == 0


@given(
    st.lists(st.text("ab ", min_size=1, max_size=3), max_size=30),
    st.booleans(),
    st.lists(st.integers(1, 5), min_size=1, max_size=10),
)
def test_both_modes_are_told_apart_where_chunks_join_tokens(
    tokens: list[str], incremental: bool, sizes: list[int]
) -> None:
    """Texts that repeat themselves, several tokens in one chunk: the ids decide."""
    model = FakeModel("".join(tokens), tokenize=lambda _: list(tokens))
    asked = Asked.of({"text": "x"})
    [answer] = model.answers(asked)
    assembly = StreamAssembly(request(), backend="endpoint", rid="r")
    at = 0
    for size in itertools.cycle(sizes):
        before, at = at, min(at + size, answer.steps)
        chunk = answer.chunk(asked, at, incremental=False, ids=True)
        if incremental:
            chunk["text"] = "".join(answer.tokens[before:at])
            chunk["output_ids"] = chunk["output_ids"][before:]
        assembly.add(json.dumps(chunk).encode())
        if at == answer.steps:
            break
    assert assembly.results()[0]["text"] == "".join(tokens)
    assert assembly.results()[0]["output_ids"] == list(answer.ids)


async def test_a_program_streams() -> None:
    @sgl.function
    async def ask(s: sgl.ProgramState) -> None:
        s += sgl.user("Hi")
        s += sgl.assistant(sgl.gen("answer"))

    async with (
        FakeServer(TEXT, packets=3) as server,
        RuntimeEndpoint(server.url) as there,
        ask.stream(backend=there) as run,
    ):
        pieces = [piece async for piece in run.text("answer")]
        state = await run.result()
    assert "".join(pieces) == state["answer"] == TEXT
