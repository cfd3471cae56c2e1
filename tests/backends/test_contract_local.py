"""The contract where no script gives the answers: the engine in this process and behind a server.

The same cases as ``test_contract`` has for providers, over ``Runtime``, ``RuntimeEndpoint`` and a
``Router`` of both, on one tiny random model. What answers must be follows from greedy decoding,
which repeats, and from the constraints. What only a network can do to a call (each error, broken
and truncated streams, retries) is in the tests of the endpoint, with a server that fails on demand.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

import asyncsgl as sgl
from asyncsgl.backends.base import Backend
from asyncsgl.errors import BadRequestError, ClosedError, UnsupportedFeature
from asyncsgl.sampling import SAMPLING_FIELDS
from asyncsgl.types import GenRequest, Message, SamplingParams
from tests.fakes.service import PNG

from .cases import (
    NUMBERS,
    RULES,
    Colour,
    answer,
    choose,
    fork_in_three,
    meta_of,
    read,
    roles_of,
    shown,
    talk,
)

pytestmark = pytest.mark.anyio

LETTER_A, QUOTE = 32, 1  # tokens of the tiny model: its letters in order, from "!" on
AT_ONCE = 4
LONG_GEN: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


@dataclass
class Local:
    """A backend and the engine that does its work."""

    backend: Backend
    engine: sgl.Runtime

    async def assert_idle(self) -> None:
        """No request is left, and every page is free or cached."""
        assert await self.engine.flush_cache(wait=True)
        now = self.engine.statistics()
        assert (now["running"], now["waiting"], now["pages_held"]) == (0, 0, 0)
        assert now["pages_free"] == now["pages_total"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose tokens are bytes."""
    from tests.engine.conftest import save_model  # not where LiteLLM has its environment

    return save_model("llama", tmp_path_factory.mktemp("model"))


def engine_of(folder: Path, **settings: Any) -> sgl.Runtime:
    return sgl.Runtime(
        str(folder),
        num_threads=1,
        dtype="float32",
        max_total_tokens=8192,
        max_running_requests=AT_ONCE,
        **settings,
    )


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Iterator[sgl.Runtime]:
    """The engine of all cases, served besides."""
    runtime = engine_of(folder, port=0)
    asyncio.run(runtime.start())
    yield runtime
    runtime.shutdown()


KINDS = ("runtime", "endpoint", "router")


def backend_of(kind: str, engine: sgl.Runtime) -> Backend:
    assert engine.url is not None
    match kind:
        case "runtime":
            return engine
        case "endpoint":
            return sgl.RuntimeEndpoint(engine.url)
        case _:
            return sgl.Router([engine, sgl.RuntimeEndpoint(engine.url)], "round_robin")


async def close(backend: Backend, engine: sgl.Runtime) -> None:
    """Close what the engine's fixture does not."""
    for one in backend.backends if isinstance(backend, sgl.Router) else [backend]:
        if one is not engine:
            await one.aclose()


@pytest.fixture(params=KINDS)
async def at(request: pytest.FixtureRequest, loaded: sgl.Runtime) -> AsyncGenerator[Local, None]:
    backend = backend_of(request.param, loaded)
    made = Local(backend, loaded)
    yield made
    await made.assert_idle()
    await close(backend, loaded)


async def run(at: Local, **gen: Any) -> sgl.State:
    gen = {"max_tokens": 24, "temperature": 0, **gen}
    return await answer.run(gen=gen, backend=at.backend)


def asked(text: str = "Say hello.", **sampling: Any) -> GenRequest:
    """A chat request, as a program makes it."""
    return GenRequest(
        (Message("user", (text,)), Message("assistant", ())),
        SamplingParams(**{"max_tokens": 24, "temperature": 0, **sampling}),
        "gen-1",
        f"USER:{text}\nASSISTANT:",
        None,
        True,
    )


# -- text ------------------------------------------------------------------------------------


async def test_text_is_greedy_and_repeats(at: Local, loaded: sgl.Runtime) -> None:
    state = await run(at)
    here = await answer.run(gen={"max_tokens": 24, "temperature": 0}, backend=loaded)
    assert state["answer"] == here["answer"] != ""
    meta = meta_of(state)
    assert (meta.backend, meta.emulated) == (at.backend.name, ())
    assert (meta.finish_reason, meta.completion_tokens) == ("length", 24)


async def test_turns_and_the_system_message_reach_the_model(at: Local) -> None:
    state = await talk.run(gen={"regex": "[a-z]{5}"}, backend=at.backend, temperature=0)
    prompt = (
        "SYSTEM:You are a poet.\nUSER:First question?\n"
        f"ASSISTANT:{state['one']}\nUSER:Second question?\nASSISTANT:"
    )
    assert state.text() == f"{prompt}{state['two']}\n"
    assert meta_of(state, "two").prompt_tokens == len(prompt.encode())
    assert meta_of(state, "two").cached_tokens > 0
    assert roles_of(state) == ["system", "user", "assistant", "user", "assistant"]


async def test_text_outside_of_roles(at: Local) -> None:
    @sgl.function
    async def raw(s: sgl.ProgramState) -> None:
        s += "Q: What is 6 times 7?\nA:" + sgl.gen("answer", max_tokens=4)

    meta = meta_of(await raw.run(backend=at.backend))
    assert meta.prompt_tokens == len("Q: What is 6 times 7?\nA:")
    assert meta.emulated == ()


async def test_a_stream_gives_what_a_call_gives(at: Local) -> None:
    whole = await at.backend.generate(asked())
    [pieces], last = await read(at.backend.stream(asked()))
    assert len(pieces) > 1
    assert last.completions == whole.completions
    assert last.usage.completion_tokens == whole.usage.completion_tokens


async def test_a_program_streams(at: Local) -> None:
    text = await shown(at.backend, {"max_tokens": 24, "temperature": 0})
    assert text == (await run(at))["answer"]


async def test_usage_is_counted(at: Local) -> None:
    state = await run(at, max_tokens=7)
    prompt = "SYSTEM:You are brief.\nUSER:Say hello.\nASSISTANT:"
    assert state.usage.requests == 1
    assert state.usage.prompt_tokens == len(prompt)
    assert state.usage.completion_tokens == 7
    again = await run(at, max_tokens=7)
    assert again.usage.cached_tokens > 0


async def test_no_tokens_at_all_computes_the_prompt(at: Local) -> None:
    state = await run(at, max_tokens=0)
    assert (state["answer"], state.usage.completion_tokens) == ("", 0)


# -- stops, n, sampling ------------------------------------------------------------------------


async def test_stop_strings_end_the_text(at: Local) -> None:
    text = (await run(at))["answer"]
    for stops in ([text[6:8]], [text[10:11], text[6:8]], [*[f"<{n}>" for n in range(7)], text[9]]):
        expected = text[: min(text.find(stop) for stop in stops if stop in text)]
        state = await run(at, stop=stops)
        assert state["answer"] == expected
        assert meta_of(state).finish_reason == "stop"
        assert meta_of(state).matched_stop in stops
        gen = {"max_tokens": 24, "temperature": 0, "stop": stops}
        assert await shown(at.backend, gen) == expected


async def test_stop_patterns_end_the_text(at: Local) -> None:
    text = (await run(at))["answer"]
    pattern = re.escape(text[6:8])
    state = await run(at, stop_regex=pattern)
    assert state["answer"] == text[: text.find(text[6:8])]
    assert meta_of(state).emulated == ()


async def test_stop_tokens_end_the_text(at: Local) -> None:
    generation = await at.backend.generate(asked())
    tokens = generation.completions[0].token_ids
    stopped = await at.backend.generate(asked(stop_token_ids=[tokens[5]]))
    assert stopped.completions[0].completion_tokens == tokens.index(tokens[5]) + 1


async def test_several_answers(at: Local) -> None:
    state = await run(at, n=3, temperature=1, seed=3)
    assert len(set(state["answer"])) == 3
    pieces, _ = await read(at.backend.stream(asked(n=3, temperature=1.0, seed=5)), answers=3)
    whole = await at.backend.generate(asked(n=3, temperature=1.0, seed=5))
    assert [one.text for one in whole.completions] == ["".join(each) for each in pieces]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *NUMBERS,
        ("logit_bias", {LETTER_A: 100.0}),
    ],
)
async def test_a_sampling_field_is_taken(at: Local, field: str, value: object) -> None:
    assert at.backend.capabilities.support(field) == "native"
    state = await run(at, **{field: value})
    assert meta_of(state).completion_tokens > 0
    assert meta_of(state).emulated == ()
    if field == "logit_bias":
        assert state["answer"] == "A" * 24


async def test_every_sampling_field_is_native(at: Local) -> None:
    can = at.backend.capabilities
    assert {field: can.support(field) for field in SAMPLING_FIELDS} == dict.fromkeys(
        SAMPLING_FIELDS, "native"
    )


async def test_logprobs(at: Local) -> None:
    request = asked(return_logprob=True, top_logprobs_num=2, return_text_in_logprobs=True)
    completion = (await at.backend.generate(request)).completions[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == completion.completion_tokens == 24
    for entry in completion.logprobs:
        assert entry.top[0][0] == entry.token_id  # greedy: the best is taken
        assert entry.logprob is not None
        assert entry.logprob <= 0
    streamed = [delta async for delta in at.backend.stream(request)][-1].generation
    assert streamed is not None
    again = streamed.completions[0].logprobs
    assert again is not None
    assert [entry.token_id for entry in again] == [entry.token_id for entry in completion.logprobs]
    for entry, same in zip(completion.logprobs, again, strict=True):
        assert entry.logprob == pytest.approx(same.logprob, abs=1e-4)  # the cache changes last bits


# -- types ---------------------------------------------------------------------------------------


class Town(BaseModel):
    name: Annotated[str, Field(pattern="^[a-z]{3,8}$")]
    people: Annotated[int, Field(ge=0, le=999)]
    kind: Literal["big", "small"]


@pytest.mark.parametrize("dtype", [int, float, bool, Colour, Literal["a", "b"]])
async def test_typed_values(at: Local, dtype: Any) -> None:
    state = await run(at, dtype=dtype, max_tokens=60)
    value = state.value("answer")
    if dtype == Literal["a", "b"]:
        assert value in ("a", "b")
    else:
        assert type(value) is dtype
    assert meta_of(state).emulated == ()
    assert state.usage.requests == 1


async def test_a_quoted_string(at: Local) -> None:
    state = await run(at, dtype=str, max_tokens=60, logit_bias={QUOTE: 20.0})
    value = state.value("answer")
    assert isinstance(value, str)
    assert json.loads(state["answer"]) == value


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_regular_expression_is_kept(at: Local, streamed: bool) -> None:
    gen = {"regex": r"(19|20)\d{2} [a-f]{3}", "temperature": 0}
    text = await shown(at.backend, gen) if streamed else (await run(at, **gen))["answer"]
    assert re.fullmatch(r"(19|20)\d{2} [a-f]{3}", text)


async def test_a_model_class(at: Local) -> None:
    state = await run(at, dtype=Town, max_tokens=80)
    town = state.value("answer")
    assert isinstance(town, Town)
    assert json.loads(state["answer"]) == town.model_dump()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
         "required": ["a"], "additionalProperties": False},
        {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2, "maxItems": 3},
        {"type": "string", "minLength": 2, "maxLength": 4},
    ],
    ids=["object", "array", "string"],
)  # fmt: skip
async def test_a_json_schema(at: Local, schema: dict[str, Any]) -> None:
    state = await run(at, json_schema=schema, max_tokens=80)
    jsonschema.validate(json.loads(state["answer"]), schema)
    assert meta_of(state).emulated == ()


async def test_a_grammar(at: Local) -> None:
    state = await run(at, ebnf='root ::= "yes" | "no"')
    assert state["answer"] in ("yes", "no")


@RULES
async def test_select(at: Local, rule: sgl.ChoicesMethod, loaded: sgl.Runtime) -> None:
    state = await choose.run(rule=rule, backend=at.backend)
    here = await choose.run(rule=rule, backend=loaded)
    assert state["verdict"] == here["verdict"]
    scores, expected = meta_of(state, "verdict").choice_scores, meta_of(here, "verdict")
    assert scores == pytest.approx(expected.choice_scores, abs=1e-4)
    assert meta_of(state, "verdict").emulated == ()


# -- images and reasoning ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
async def test_images_are_refused_on_a_text_model(at: Local, count: int) -> None:
    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        with s.user():
            for _ in range(count):
                s += "See " + sgl.image(PNG)
        s += sgl.assistant(sgl.gen("answer", max_tokens=4))

    before = at.engine.statistics()["prompt_tokens"]
    with pytest.raises(UnsupportedFeature, match="image"):
        await look.run(backend=at.backend)
    assert at.engine.statistics()["prompt_tokens"] == before


async def test_separate_reasoning(at: Local) -> None:
    @sgl.function
    async def think(s: sgl.ProgramState) -> None:
        s += sgl.user("Think.")
        gen = sgl.gen("answer", regex="<think>[a-z]{4}</think>[0-9]{2}")
        s += sgl.assistant(sgl.separate_reasoning(gen, "qwen3"))

    state = await think.run(backend=at.backend, temperature=0)
    assert re.fullmatch("[0-9]{2}", state["answer"])
    assert re.fullmatch("[a-z]{4}", state["answer_reasoning_content"])


# -- continuing a turn ---------------------------------------------------------------------------


async def test_several_values_in_one_turn(at: Local) -> None:
    @sgl.function(num_api_spec_tokens=64)  # without effect: the turn can be continued
    async def go_on(s: sgl.ProgramState) -> None:
        s += sgl.user("Count.")
        s += sgl.assistant("One, " + sgl.gen("two", regex="[a-z]{3}") + ", " + sgl.gen("rest"))

    state = await go_on.run(backend=at.backend, temperature=0, max_tokens=4)
    assert state.usage.requests == 2
    prompt = f"USER:Count.\nASSISTANT:One, {state['two']}, "
    assert meta_of(state, "rest").prompt_tokens == len(prompt.encode())
    assert meta_of(state, "rest").emulated == ()


# -- errors --------------------------------------------------------------------------------------


async def test_a_prompt_that_is_too_long_says_so(at: Local) -> None:
    with pytest.raises(BadRequestError, match=r"(?i)context|long"):
        await at.backend.generate(asked("x" * 1000))


@pytest.mark.parametrize("kind", KINDS)
async def test_after_closing_it_says_so(kind: str, loaded: sgl.Runtime, folder: Path) -> None:
    engine = engine_of(folder) if kind == "runtime" else loaded
    backend = engine if kind == "runtime" else backend_of("endpoint", loaded)
    if kind == "router":
        backend = sgl.Router([backend])
    await backend.generate(asked(max_tokens=1))
    await backend.aclose()
    await backend.aclose()
    with pytest.raises(ClosedError):
        await backend.generate(asked())
    with pytest.raises(ClosedError):
        await backend.score(asked(), ["a", "b"])


# -- cancellation --------------------------------------------------------------------------------


async def gone(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task


def started(at: Local, **gen: Any) -> asyncio.Task[sgl.State]:
    return asyncio.create_task(run(at, **LONG_GEN, **gen))


async def counted(at: Local, name: str, least: int) -> None:
    while at.engine.statistics()[name] < least:  # noqa: ASYNC110 - the engine has no event for it
        await asyncio.sleep(0.001)


async def test_cancelled_before_anything_is_sent(at: Local) -> None:
    task = started(at)
    await asyncio.sleep(0)
    await gone(task)


async def test_cancelled_while_it_waits_for_its_turn(at: Local) -> None:
    running = [started(at) for _ in range(AT_ONCE)]
    await counted(at, "running", AT_ONCE)
    waiting = started(at)
    await counted(at, "waiting", 1)
    await gone(waiting)
    await gone(*running)


async def test_cancelled_before_the_first_token(at: Local) -> None:
    before = at.engine.statistics()["prompt_tokens"]
    task = started(at)
    while at.engine.statistics()["prompt_tokens"] == before and not task.done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    await gone(task)


async def test_cancelled_in_the_middle_of_a_stream(at: Local) -> None:
    async with aclosing(at.backend.stream(asked(**LONG_GEN))) as deltas:
        async for delta in deltas:
            if delta.text:
                break


async def test_cancelled_in_the_middle_of_a_call(at: Local) -> None:
    task = started(at)
    await counted(at, "running", 1)
    await gone(task)


async def test_a_fork_is_cancelled_with_its_program(at: Local) -> None:
    task = asyncio.create_task(fork_in_three.run(gen=LONG_GEN, backend=at.backend))
    await counted(at, "running", 3)
    await gone(task)


# -- life ----------------------------------------------------------------------------------------


async def test_many_calls_at_once(at: Local) -> None:
    states = await asyncio.gather(*[run(at, max_tokens=6) for _ in range(30)])
    assert len({state["answer"] for state in states}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_backend_serves_several_loops(kind: str, loaded: sgl.Runtime) -> None:
    async def all_in_one_loop() -> None:
        backend = backend_of(kind, loaded)
        at = Local(backend, loaded)

        def in_another_loop() -> str:
            async def once() -> str:
                return str((await run(at))["answer"])

            return asyncio.run(once())

        here = (await run(at))["answer"]
        assert await asyncio.to_thread(in_another_loop) == here
        assert await asyncio.to_thread(in_another_loop) == here
        await close(backend, loaded)

    asyncio.run(all_in_one_loop())
