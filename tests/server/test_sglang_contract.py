"""What our client sends and our server answers, judged by SGLang's own models."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import asyncsgl as sgl
from asyncsgl.program.prefix import prefix_request
from asyncsgl.testing_server import FakeServer
from asyncsgl.types import Constraint, SamplingParams

from .conftest import Serve, Served
from .test_native import GREEDY, events

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None, reason="sglang is not installed"
    ),
    pytest.mark.timeout(60),
]

JUDGE = Path(__file__).with_name("sglang_judge.py")
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def wrongs(*asked: tuple[str, Any]) -> list[str | None]:
    """What SGLang's models find wrong with each [kind, value]."""
    done = subprocess.run(
        [sys.executable, str(JUDGE)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_right(*asked: tuple[str, Any]) -> None:
    assert asked
    assert wrongs(*asked) == [None] * len(asked)


def test_the_judge_is_strict() -> None:
    bad = [
        {"text": "x", "sampling_params": {"max_tokens": 3}},
        {"text": "x", "sampling_params": {"json_schema": {"type": "object"}}},
        {"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}},
        {"text": "x", "sampling_params": {"top_k": 0}},
        {"text": "x", "sampling_params": {"logit_bias": {"99999": 1.0}}},
        {"text": ["x", "y"], "rid": ["a", "a"]},
        {"input_ids": ["x"]},
        {},
    ]
    assert None not in wrongs(*(("generate", body) for body in bad))


# -- the client -----------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)
ONE_OF_EACH = SamplingParams(
    max_tokens=5,
    min_tokens=1,
    n=1,
    stop=("a",),
    stop_token_ids=(1,),
    stop_regex=("b+",),
    temperature=0.1,
    top_p=0.5,
    top_k=3,
    min_p=0.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    repetition_penalty=1.1,
    ignore_eos=False,
    logit_bias={1: 1.0},
    seed=1,
    return_logprob=True,
    logprob_start_len=0,
    top_logprobs_num=1,
    return_text_in_logprobs=True,
)


def answer(prompt: str) -> str:
    return "True" if prompt.rstrip().endswith("7") else "7"


@sgl.function
async def everything(s: sgl.ProgramState, picture: bytes) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("What is it?" + sgl.image(picture) + sgl.image(picture))
    s += sgl.assistant(sgl.gen("it", max_tokens=3))
    s += sgl.user("Good?")
    s += sgl.assistant(sgl.select("good", ["yes", "no"]))
    s += sgl.assistant(
        sgl.select("sure", ["a", "b"], choices_method=sgl.unconditional_likelihood_normalized)
    )
    for kind in (int, float, bool, str):
        s += sgl.assistant(sgl.gen(kind.__name__, dtype=kind, max_tokens=4))
    s += sgl.assistant(sgl.gen("many", n=3, max_tokens=2))
    s += sgl.assistant(sgl.gen("seeded", n=2, seed=5, max_tokens=2))
    async with s.fork(2) as branches:
        branches += sgl.gen("branch", stop=["\n", "."], max_tokens=2)


async def test_what_programs_send_is_what_sglang_takes() -> None:
    async with FakeServer(answer) as server, sgl.RuntimeEndpoint(server.url) as there:
        await everything.run(picture=PNG, backend=there)
        async with everything.stream(picture=PNG, backend=there) as run:
            await run.result()
        request = prefix_request("Say")
        for constraint in (
            Constraint("regex", "a|b"),
            Constraint("json_schema", '{"type":"object"}'),
            Constraint("ebnf", 'root ::= "a"'),
        ):
            await there.generate(replace(request, constraint=constraint))
        await there.generate(replace(request, sampling=ONE_OF_EACH))
        await there.cache_prefix(request)
        bodies = server.generates()
    assert any("image_data" in body for body in bodies)
    assert any(body.get("stream") for body in bodies)
    assert any("input_ids" in body for body in bodies)
    assert any(isinstance(body.get("rid"), list) for body in bodies)
    assert await asyncio.to_thread(wrongs, *(("generate", body) for body in bodies)) == [
        None
    ] * len(bodies)


async def test_aborts_and_profiles_are_what_sglang_takes() -> None:
    async with FakeServer("ok", delay=60) as server, sgl.RuntimeEndpoint(server.url) as there:
        running = asyncio.ensure_future(there.generate(prefix_request("Say")))
        await server.until(lambda: server.running == 1)
        running.cancel()
        await asyncio.wait([running])
        await server.until(lambda: bool(server.aborted))
        await there.start_profile(output_dir="/traces", num_steps=3)
        sent = {request.path: request for request in server.requests}
    for path in ("/generate", "/abort_request", "/start_profile"):
        assert sent[path].headers["content-type"] == "application/json"
    await asyncio.to_thread(
        assert_right,
        ("abort", sent["/abort_request"].json),
        ("profile", sent["/start_profile"].json),
    )


# -- the server -----------------------------------------------------------------------------------


def test_native_answers_are_what_sglang_reads(served: Served, serve: Serve) -> None:
    scores = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [1, 2],
        "return_text_in_logprobs": True,
        "return_prompt_token_ids": True,
    }
    stopped = served.generate()["text"][3:6]
    answers = [
        served.generate(),
        served.generate(**scores),
        served.generate(sampling_params={**GREEDY, "stop": stopped}),
        served.generate(sampling_params={**GREEDY, "max_new_tokens": 0}, **scores),
        *served.generate(["a b", "c d"], sampling_params={**GREEDY, "n": 2}),
        *events(served.url, text=["a b", "c d"], sampling_params=GREEDY, **scores),
        *events(
            serve(incremental_streaming_output=True).url,
            text="a b",
            sampling_params=GREEDY,
            **scores,
        ),
    ]
    assert_right(*(("answer", answer) for answer in answers))


def test_what_the_server_tells_of_itself_is_what_sglang_reads(served: Served) -> None:
    assert_right(
        ("model_info", served.get("/model_info").json()),
        ("server_info", served.get("/server_info").json()),
        *(("load", load) for load in served.get("/v1/loads").json()["loads"]),
        ("models", served.get("/v1/models").json()),
        ("tokens", served.post("/v1/tokenize", prompt=["a b", "c"]).json()),
        ("text", served.post("/v1/detokenize", tokens=[1, 2]).json()),
        ("error", served.post("/generate").json()),
        ("stream_error", served.post("/generate").json()),
        ("error", served.post("/v1/completions", prompt="").json()),
        ("error", served.get("/nowhere").json()),
    )


def test_openai_answers_are_what_sglang_gives(served: Served) -> None:
    def chunks(path: str, **body: Any) -> list[Any]:
        ask = {**body, "stream": True, "stream_options": {"include_usage": True}}
        lines = httpx.post(served.url + path, json=ask, timeout=60).text.split("\n\n")
        return [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]

    chat, completion = "/v1/chat/completions", "/v1/completions"
    scored: dict[str, Any] = {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}
    texts: dict[str, Any] = {"prompt": ["a b", "c"], "logprobs": 2, "echo": True}
    assert_right(
        ("chat", served.post(chat, **CHAT).json()),
        ("chat", served.post(chat, **scored).json()),
        *(("chat_chunk", chunk) for chunk in chunks(chat, **scored)),
        ("completion", served.post(completion, prompt="a b").json()),
        ("completion", served.post(completion, **texts).json()),
        *(("completion_chunk", chunk) for chunk in chunks(completion, **texts)),
    )
