"""Every form of error of an SGLang server, which are tried again, and how that is kept decent."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace

import pytest

import asyncsgl as sgl
from asyncsgl import RuntimeEndpoint
from asyncsgl.backends.http_errors import message_of
from asyncsgl.program.prefix import prefix_request
from asyncsgl.testing_server import Abort, Drop, FakeServer, Fault, Hang, Refuse, Say
from asyncsgl.types import SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("http_library")]

FLAT = {"object": "error", "message": "said so", "type": "Bad Request", "param": None, "code": 400}


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Refuse(400, {"error": "said so"}), sgl.BadRequestError, "said so"),
        (Refuse(400, {"error": {"message": "said so"}}), sgl.BadRequestError, "said so"),
        (Refuse(400, FLAT), sgl.BadRequestError, "said so"),
        (Refuse(422, {"detail": [{"msg": "said so"}]}), sgl.BadRequestError, "said so"),
        (Refuse(401, {"error": "Unauthorized"}), sgl.AuthenticationError, "Unauthorized"),
        (Refuse(403, {"error": "Forbidden"}), sgl.PermissionDeniedError, "Forbidden"),
        (Refuse(404, {"detail": "Not Found"}), sgl.NotFoundError, "Not Found"),
        (Refuse(413, ""), sgl.BadRequestError, "Request Entity Too Large"),
        (Refuse(500, "plain words"), sgl.BackendError, "plain words"),
        (Refuse(502, "<html>" + "x" * 9000), sgl.BackendError, "<html>xx"),
        (Refuse(418, ""), sgl.BadRequestError, "I'm a Teapot"),
        (Abort(None, "by the user", after=2), sgl.BackendError, "by the user"),
        (Abort(None), sgl.BackendError, "Abort in waiting queue"),
        (Abort(400, "bad"), sgl.BadRequestError, "bad"),
        (Say(b"not json"), sgl.BackendError, "not JSON: 'not json'"),
        (Say(b"[]"), sgl.BackendError, "0 results for 1"),
        (Say(b'{"meta_info": {}}'), sgl.BackendError, "no text"),
        (Say(b'{"error": {"message": "said so", "code": 400}}'), sgl.BadRequestError, "said so"),
        (
            Refuse(
                400, {"error": {"message": "longer than the model's context length (9 tokens)"}}
            ),
            sgl.ContextLengthError,
            "context length",
        ),
    ],
)
async def test_forms_of_errors(fault: Fault, error: type[sgl.BackendError], words: str) -> None:
    async with (
        FakeServer("x", faults=[fault]) as server,
        RuntimeEndpoint(server.url, max_retries=0) as there,
    ):
        with pytest.raises(error) as caught:
            await there.generate(say())
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert len(str(caught.value)) < 700
    assert caught.value.backend == "endpoint"
    assert caught.value.request_id == server.generates()[0]["rid"]
    if isinstance(fault, Refuse):
        assert caught.value.status == fault.status


def say(text: str = "Say") -> sgl.GenRequest:
    return replace(prefix_request(text), sampling=SamplingParams())


def test_words_of_no_error() -> None:
    assert message_of({"text": "x"}) == ("", None)
    assert message_of("x") == ("", None)
    assert message_of({"error": {"code": "503"}}) == ('{"code": "503"}', 503)


@pytest.mark.parametrize(
    "fault",
    [
        Refuse(503, {"object": "error", "message": "The request queue is full.", "code": 503}),
        Refuse(500, "crash"),
        Refuse(502, "bad gateway"),
        Abort(503, "The request queue is full."),
        Abort(500, "scheduler"),
        Drop(),
    ],
)
async def test_what_may_pass_is_tried_again(fault: Fault) -> None:
    async with (
        FakeServer("x", faults=[fault]) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        generation = await there.generate(say())
        assert generation.completions[0].text == "x"
        assert there.statistics() == {"requests": 2, "retries": 1}
    first, second = (body["rid"] for body in server.generates())
    assert first != second


async def test_bad_requests_are_never_tried_again() -> None:
    faults = [Refuse(400, {"error": "no"})]
    async with FakeServer("x", faults=faults) as server, RuntimeEndpoint(server.url) as there:
        with pytest.raises(sgl.BadRequestError):
            await there.generate(say())
        assert len(server.generates()) == 1


async def test_tries_are_bounded() -> None:
    faults = [Refuse(500, "down")] * 9
    async with (
        FakeServer("x", faults=faults) as server,
        RuntimeEndpoint(server.url, max_retries=2) as there,
    ):
        with pytest.raises(sgl.BackendError, match="down") as caught:
            await there.generate(say())
        assert len(server.generates()) == 3
    assert caught.value.__notes__ == ["asyncsgl tried 3 times"]


async def test_retry_after_is_kept() -> None:
    faults = [Refuse(503, {"error": "full"}, {"Retry-After": "0.3"})]
    async with FakeServer("x", faults=faults) as server, RuntimeEndpoint(server.url) as there:
        start = time.monotonic()
        await there.generate(say())
        assert time.monotonic() - start >= 0.3


async def test_unknown_sampling_keys_are_not_sent() -> None:
    """The fake refuses them, as SGLang does; every field that we have passes."""
    everything = SamplingParams(**_ONE_OF_EACH)  # type: ignore[arg-type]
    async with FakeServer("x") as server, RuntimeEndpoint(server.url) as there:
        await there.generate(replace(prefix_request("Say"), sampling=everything))


_ONE_OF_EACH: dict[str, object] = {
    "max_tokens": 5,
    "min_tokens": 1,
    "n": 1,
    "stop": ["a"],
    "stop_token_ids": [1],
    "stop_regex": ["b"],
    "temperature": 0.1,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "repetition_penalty": 1.1,
    "ignore_eos": False,
    "logit_bias": {1: 1.0},
    "seed": 1,
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 1,
    "return_text_in_logprobs": True,
}


def test_each_field_is_tried() -> None:
    assert set(_ONE_OF_EACH) == set(SamplingParams.__dataclass_fields__)


async def test_no_server() -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    async with RuntimeEndpoint(f"http://127.0.0.1:{port}", max_retries=1) as there:
        with pytest.raises(sgl.BackendConnectionError, match=f"127.0.0.1:{port}"):
            await there.generate(say())
        assert there.statistics()["retries"] == 1


async def test_a_silent_server_is_a_timeout_and_is_told_to_stop() -> None:
    async with (
        FakeServer("x", faults=[Hang()], notices=False) as server,
        RuntimeEndpoint(server.url, timeout=0.2, max_retries=0) as there,
    ):
        with pytest.raises(sgl.BackendTimeout, match=r"silent for more than 0\.2 seconds"):
            await there.generate(say())
        assert server.aborted == [server.generates()[0]["rid"]]


async def test_a_stream_that_falls_silent_is_a_timeout() -> None:
    async with (
        FakeServer("a b c", faults=[Hang(after=2)]) as server,
        RuntimeEndpoint(server.url, timeout=0.2) as there,
    ):
        with pytest.raises(sgl.BackendTimeout):
            async for _ in there.stream(say()):
                pass
        assert server.aborted == [server.generates()[0]["rid"]]


async def test_slow_but_alive_is_no_timeout() -> None:
    async with (
        FakeServer("a b c d e f", delay=0.08) as server,
        RuntimeEndpoint(server.url, timeout=0.3) as there,
    ):
        deltas = [delta async for delta in there.stream(say())]
    assert "".join(delta.text for delta in deltas) == "a b c d e f"


async def test_a_server_that_drops_idle_connections() -> None:
    async with FakeServer("x", idle=0.05) as server, RuntimeEndpoint(server.url) as there:
        await there.generate(say())
        await server.until(lambda: server.connections == 0)
        await there.generate(say())
        assert there.statistics()["retries"] == 0
        assert server.accepted == 2


async def test_an_overloaded_server_is_left_alone_by_all_calls() -> None:
    """One 503 with Retry-After holds back the calls that come after it, too."""
    faults = [Refuse(503, {"error": "full"}, {"Retry-After": "0.4"})]
    async with FakeServer("x", faults=faults) as server, RuntimeEndpoint(server.url) as there:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(there.generate(say("first")))
            await server.until(lambda: bool(server.generates()) and server.running == 0)
            start = time.monotonic()
            tasks.create_task(_later(there))
        assert time.monotonic() - start >= 0.3
        assert len(server.generates()) == 3


async def test_errors_can_be_read_by_programs() -> None:
    @sgl.function
    async def ask(s: sgl.ProgramState) -> None:
        s += "Say" + sgl.gen("x")

    async with (
        FakeServer("x", faults=[Refuse(400, {"error": "no"})]) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        with pytest.raises(sgl.BadRequestError) as caught:
            await ask.run(backend=there)
    assert isinstance(caught.value.state, sgl.State)


async def _later(there: RuntimeEndpoint) -> None:
    """A call that begins after the refusal of the first has been read."""
    await there.get_server_info()
    await there.generate(say("second"))
