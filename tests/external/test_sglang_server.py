"""Programs on SGLang's own server, beside the same programs on the local engine.

The server is SGLang's package as it is, with its PyTorch code in place of its kernels;
``nox -s sglang-server``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import asyncsgl as sgl
from asyncsgl import errors
from asyncsgl.program.prefix import prefix_request
from asyncsgl.types import Constraint, Generation, GenRequest, SamplingParams
from asyncsgl_engine.hub import DEFAULT_MODEL, resolve_model

from .services import command, free_port, started

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

LAUNCHER = Path(__file__).with_name("sglang_cpu.py")
CONTEXT = 2048
START = 240.0
GREEDY = sgl.greedy_token_selection
KEY = "sesame"
SCHEMA = {"enum": ["red", 12]}


@dataclass(frozen=True)
class Server:
    """A running server and what it has written."""

    url: str
    log: Path
    process: int
    key: str | None = None

    def endpoint(self, **more: Any) -> sgl.RuntimeEndpoint:
        return sgl.RuntimeEndpoint(self.url, api_key=self.key, **more)

    def seen(self, line: str) -> int:
        """How often it wrote something."""
        return self.log.read_text(errors="replace").count(line)


Start = Callable[..., "contextlib.AbstractContextManager[Server]"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the default model's tokenizer."""
    source = resolve_model(DEFAULT_MODEL).path
    folder = tmp_path_factory.mktemp("smollm-instruct")  # the name tells the chat template
    torch.manual_seed(11)
    config: Any = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    return folder


@pytest.fixture(scope="session")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts a server of one's own, with SGLang's flags."""
    python = command("ASYNCSGL_SGLANG", "a Python that has SGLang")

    @contextlib.contextmanager
    def begun(*flags: str, key: str | None = None) -> Iterator[Server]:
        port, log = free_port(), tmp_path_factory.mktemp("sglang") / "log"
        arguments = [
            *(python, str(LAUNCHER), "--model-path", str(model), "--port", str(port)),
            *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
            *("--max-total-tokens", "32768", *flags),
            *(("--api-key", key) if key else ()),
        ]
        with started(arguments, f"http://127.0.0.1:{port}/ready", log, START) as process:
            yield Server(f"http://127.0.0.1:{port}", log, process.pid, key)

    return begun


@pytest.fixture(scope="session")
def server(start: Start) -> Iterator[Server]:
    """As SGLang starts by default."""
    with start() as made:
        yield made


@pytest.fixture(scope="session")
def narrow(start: Start) -> Iterator[Server]:
    """With a key, deltas for streams, one request at a time and one in its queue."""
    flags = ("--incremental-streaming-output", "--max-running-requests", "1")
    with start(*flags, "--max-queued-requests", "1", key=KEY) as made:
        yield made


@pytest.fixture(params=["server", "narrow"])
def either(request: pytest.FixtureRequest) -> Server:
    made: Server = request.getfixturevalue(request.param)
    return made


@pytest.fixture
async def runtime(model: Path) -> AsyncIterator[sgl.Runtime]:
    """The local engine with the same weights."""
    made = sgl.Runtime(str(model), dtype="float32", max_total_tokens=16384, num_threads=1)
    async with made:
        yield made


def asking(text: str = "Once upon a time", **sampling: Any) -> GenRequest:
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return replace(prefix_request(text), sampling=params)


async def streamed(backend: sgl.RuntimeEndpoint, request: GenRequest) -> tuple[str, Generation]:
    """The pieces of the first answer together, and the whole generation."""
    pieces, whole = [], None
    async for delta in backend.stream(request):
        pieces.append(delta.text if delta.index == 0 else "")
        whole = delta.generation or whole
    assert whole is not None
    return "".join(pieces), whole


async def until(held: Callable[[], bool], seconds: float) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + seconds
    while not held():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.02)


# -- the same programs ------------------------------------------------------------------------


@sgl.function
async def story(s: sgl.ProgramState) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("Tell a story.")
    s += sgl.assistant("Once" + sgl.gen("text", max_tokens=12))
    s += sgl.user("Its colour?")
    s += sgl.assistant("It is " + sgl.select("colour", ["red", "blue", "dark green"]))
    s += " and" + sgl.select("size", [" big", " small and old"], choices_method=GREEDY)
    async with s.fork(3) as branches:
        for index, branch in enumerate(branches):
            branch += f" Part {index}:" + sgl.gen("part", max_tokens=6, stop=["e"])


async def test_programs_give_what_they_give_here(server: Server, runtime: sgl.Runtime) -> None:
    async with server.endpoint() as there:
        found = await story.run(backend=there, temperature=0)
        expected = await story.run(backend=runtime, temperature=0)
    assert found.text() == expected.text()
    assert found.variables == expected.variables
    for name in ("colour", "size"):
        assert found.meta(name).choice_scores == pytest.approx(
            expected.meta(name).choice_scores, abs=1e-3
        )
    assert found.meta("text").prompt_tokens == expected.meta("text").prompt_tokens
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert found.meta("part")[0].cached_tokens > 0


async def test_logprobs_are_what_they_are_here(server: Server, runtime: sgl.Runtime) -> None:
    request = asking(logprob_start_len=0, top_logprobs_num=3, return_text_in_logprobs=True)
    async with server.endpoint() as there:
        found = (await there.generate(request)).completions[0]
        _, generation = await streamed(there, request)
    expected = (await runtime.generate(request)).completions[0]
    assert found.token_ids == generation.completions[0].token_ids
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
    for mine, theirs in (
        (found.prompt_logprobs, expected.prompt_logprobs),
        (found.logprobs, expected.logprobs),
    ):
        assert mine and theirs
        assert [entry.token_id for entry in mine] == [entry.token_id for entry in theirs]
        assert [entry.text for entry in mine] == [entry.text for entry in theirs]
        assert [entry.logprob for entry in mine[1:]] == pytest.approx(
            [entry.logprob for entry in theirs[1:]], abs=1e-3
        )
        for one, other in zip(mine, theirs, strict=True):
            assert [token for token, *_ in one.top] == [token for token, *_ in other.top]


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": 0},
        {"max_tokens": 40, "stop": ("e", "x")},
        {"max_tokens": 40, "stop_regex": ("[aeiou]{2}",)},
        {"max_tokens": 12, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"max_tokens": 6, "logit_bias": {400: 100.0}},
    ],
    ids=lambda sampling: "-".join(sampling),
)
async def test_sampling_is_what_it_is_here(
    server: Server, runtime: sgl.Runtime, sampling: dict[str, Any]
) -> None:
    request = asking(**sampling)
    async with server.endpoint() as there:
        found = (await there.generate(request)).completions[0]
    assert found == (await runtime.generate(request)).completions[0]


async def test_constraints_hold(server: Server) -> None:
    async def answer(kind: Literal["regex", "json_schema", "ebnf"], source: str) -> str:
        request = replace(asking("It is ", max_tokens=30), constraint=Constraint(kind, source))
        return (await there.generate(request)).completions[0].text

    async with server.endpoint() as there:
        assert re.fullmatch("[0-9]{3}-(a|b)", await answer("regex", "[0-9]{3}-(a|b)"))
        assert json.loads(await answer("json_schema", json.dumps(SCHEMA))) in SCHEMA["enum"]
        assert await answer("ebnf", 'root ::= "ab" | "ac"') in ("ab", "ac")


async def test_several_answers(server: Server) -> None:
    request = asking(temperature=1.0, n=3, ignore_eos=True)
    async with server.endpoint() as there:
        found = await there.generate(request)
        _, again = await streamed(there, request)
    for generation in (found, again):
        assert len(generation.completions) == 3
        assert generation.usage.completion_tokens == 24


async def test_it_says_that_a_seed_changes_nothing(server: Server) -> None:
    async with server.endpoint() as there:
        [note] = (await there.generate(asking(seed=5, n=2))).emulated
    assert "seed: ignored" in note


async def test_choices_are_scored_without_the_prompt_too(
    server: Server, runtime: sgl.Runtime
) -> None:
    choices = [" Paris", " London and Oxford", " a"]
    async with server.endpoint() as there:
        found = await there.score(asking("It is"), choices, unconditional=True)
    expected = await runtime.score(asking("It is"), choices, unconditional=True)
    for mine, theirs in zip(found.choices, expected.choices, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert mine.unconditional and len(mine.unconditional) == len(theirs.logprobs)
        assert mine.unconditional[0] == 0.0
    assert len(found.emulated) == 1, "this server tells no token that begins a text"


# -- streams ----------------------------------------------------------------------------------


async def test_streams_bring_the_whole_text_once(either: Server) -> None:
    request = asking(max_tokens=40, return_logprob=True, top_logprobs_num=2)
    async with either.endpoint() as there:
        whole = (await there.generate(request)).completions[0]
        pieces, generation = await streamed(there, request)
    [found] = generation.completions
    assert pieces == found.text == whole.text
    assert found.token_ids == whole.token_ids
    assert found.logprobs and whole.logprobs
    for mine, theirs in zip(found.logprobs, whole.logprobs, strict=True):
        assert (mine.token_id, len(mine.top)) == (theirs.token_id, 2)
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


async def test_what_is_given_up_is_aborted(either: Server) -> None:
    endless = asking(max_tokens=1800, ignore_eos=True)
    async with either.endpoint() as there:
        before = either.seen('"POST /abort_request HTTP/1.1" 200')
        async with asyncio.timeout(30):
            stream = there.stream(endless)
            async for _ in stream:
                break
            await stream.aclose()
            running = asyncio.ensure_future(there.generate(endless))
            await asyncio.sleep(1.0)  # to be under way, which no answer tells
            running.cancel()
            await asyncio.wait([running])
            assert await there.flush_cache(wait=True), "the server is idle again"
        await until(lambda: either.seen('"POST /abort_request HTTP/1.1" 200') == before + 2, 10)


async def test_a_server_that_dies_in_a_stream_is_an_error(start: Start) -> None:
    with start() as doomed:
        async with doomed.endpoint(max_retries=0) as there:
            stream = there.stream(asking(max_tokens=1800, ignore_eos=True))
            assert (await anext(stream)).text
            for process in _tree(doomed.process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with pytest.raises(errors.BackendConnectionError):
                async for _ in stream:
                    pass


def _tree(root: int) -> list[int]:
    """A process and all that it started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()[1:]]
    found = [root]
    for parent in found:
        found += [int(pid) for pid, of in rows if int(of) == parent]
    return found


# -- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        (asking("word " * (CONTEXT + 5)), errors.ContextLengthError, "longer than"),
        (asking(stop=("x",) * 40), errors.BadRequestError, "at most 32"),
        (asking(logit_bias={10**6: 1.0}), errors.BadRequestError, "logit_bias"),
        (
            replace(asking(), constraint=Constraint("ebnf", "root ::= (((")),
            errors.BadRequestError,
            "grammar",
        ),
    ],
    ids=["long", "stops", "bias", "grammar"],
)
async def test_refusals(
    either: Server, request_: GenRequest, error: type[Exception], said: str
) -> None:
    async with either.endpoint() as there:
        with pytest.raises(error, match=said):
            await there.generate(request_)
        with pytest.raises(error, match=said):
            await streamed(there, request_)
        assert there.statistics()["retries"] == 0


async def test_an_empty_prompt_never_reaches_the_server(server: Server) -> None:
    async with server.endpoint() as there:
        with pytest.raises(errors.BadRequestError, match="the prompt is empty"):
            await there.generate(asking(""))
        assert (await there.generate(asking())).completions


async def test_keys(narrow: Server) -> None:
    async with sgl.RuntimeEndpoint(narrow.url, api_key="wrong") as there:
        with pytest.raises(errors.AuthenticationError):
            await there.generate(asking())
        with pytest.raises(errors.AuthenticationError):
            await there.flush_cache()


async def test_a_full_queue_is_waited_for(narrow: Server) -> None:
    request = asking(max_tokens=60, ignore_eos=True)
    async with narrow.endpoint(max_retries=0) as there:
        each = (there.generate(request) for _ in range(8))
        ended = await asyncio.gather(*each, return_exceptions=True)
        refused = [one for one in ended if isinstance(one, BaseException)]
        assert refused
        for one in refused:
            assert isinstance(one, errors.OverloadedError), one
            assert one.status == 503
    async with narrow.endpoint(max_retries=20) as there:
        async with asyncio.timeout(120):
            found = await asyncio.gather(*(there.generate(request) for _ in range(6)))
            streams = await asyncio.gather(*(streamed(there, request) for _ in range(6)))
        assert len({one.completions[0].text for one in found} | {text for text, _ in streams}) == 1


async def test_two_hundred_programs_at_once(server: Server) -> None:
    @sgl.function
    async def small(s: sgl.ProgramState, index: int) -> None:
        s += f"Number {index}:" + sgl.gen("text", max_tokens=4, temperature=0, ignore_eos=True)

    async with server.endpoint() as there:
        states = await asyncio.gather(*(small.run(index=i, backend=there) for i in range(200)))
        assert there.statistics() == {"requests": 200, "retries": 0}
    assert all(state.meta("text").completion_tokens == 4 for state in states)


# -- what the server does besides ---------------------------------------------------------------


async def test_utilities(either: Server, tmp_path: Path) -> None:
    prompt = "A prefix that is computed once and kept in the cache of the server"
    async with either.endpoint() as there:
        info = await there.get_server_info()
        assert info["version"] == "0.5.23"
        assert info["incremental_streaming_output"] is (either.key is not None)
        assert await there.flush_cache(wait=True)
        await there.cache_prefix(prefix_request(prompt))
        found = await there.generate(asking(prompt))
        assert 0 < found.usage.cached_tokens < found.usage.prompt_tokens
        assert "Start" in await there.start_profile(output_dir=str(tmp_path))
        await there.generate(asking())
        assert "Stop" in await there.stop_profile()
        await until(lambda: any(tmp_path.rglob("*.trace.json.gz")), 60)
