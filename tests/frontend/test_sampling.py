"""Sampling fields: one definition, checked at the line, merged by precedence."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsgl as sgl
from asyncsgl.lang.expr import Gen
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Overrides, SamplingOverrides, SamplingParams

pytestmark = pytest.mark.anyio


def test_the_fields_are_listed_alike_in_both_places() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(SamplingParams)}
    assert dict(SamplingOverrides.__annotations__).keys() == fields.keys()
    listed = {name: ref.__forward_arg__ for name, ref in SamplingOverrides.__annotations__.items()}
    assert listed == fields
    assert set(Overrides.__annotations__) == {*fields, "max_new_tokens"}
    assert all(field.default is None for field in dataclasses.fields(SamplingParams))


OUT_OF_RANGE = [
    ("max_tokens", -1, "at least 0"),
    ("max_tokens", 1.5, "a whole number"),
    ("max_tokens", True, "a whole number"),
    ("min_tokens", -1, "at least 0"),
    ("n", 0, "at least 1"),
    ("n", 129, "at most 128"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", math.nan, "at least 0"),
    ("temperature", math.inf, "at least 0"),
    ("temperature", "hot", "a number"),
    ("top_p", 0, "above 0 and at most 1"),
    ("top_p", 1.01, "above 0 and at most 1"),
    ("top_k", 0, "at least 1, or -1"),
    ("top_k", -2, "at least 1, or -1"),
    ("min_p", -0.1, "at least 0 and at most 1"),
    ("min_p", 1.1, "at least 0 and at most 1"),
    ("frequency_penalty", 2.1, "at least -2 and at most 2"),
    ("presence_penalty", -2.1, "at least -2 and at most 2"),
    ("repetition_penalty", 0, "above 0"),
    ("seed", 2**63, "at most"),
    ("seed", 10**400, "at most"),
    ("logprob_start_len", -2, "at least 0, or -1"),
    ("top_logprobs_num", -1, "at least 0"),
    ("ignore_eos", 1, "True or False"),
    ("return_logprob", "yes", "True or False"),
    ("return_text_in_logprobs", 0, "True or False"),
    ("stop", [""], "non-empty"),
    ("stop", [1], "non-empty"),
    ("stop", 5, "a sequence"),
    ("stop_token_ids", [-1], "at least 0"),
    ("stop_token_ids", ["a"], "a whole number"),
    ("stop_token_ids", 7, "a sequence"),
    ("stop_regex", "(", "not a regular expression"),
    ("stop_regex", [""], "non-empty"),
    ("logit_bias", [(1, 2.0)], "map token ids"),
    ("logit_bias", {"a": 1.0}, "a whole number"),
    ("logit_bias", {-1: 1.0}, "at least 0"),
    ("logit_bias", {1: 101}, "at least -100 and at most 100"),
    ("logit_bias", {1: math.nan}, "at least -100 and at most 100"),
]


@pytest.mark.parametrize(("field", "value", "words"), OUT_OF_RANGE)
async def test_a_value_out_of_range_is_refused_at_the_line(
    field: str, value: object, words: str
) -> None:
    reached: list[str] = []

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        reached.append("before")
        s += sgl.gen("x", **{field: value})  # type: ignore[arg-type]
        reached.append("after")

    backend = ScriptedBackend("x")
    with pytest.raises(sgl.InvalidArgument, match=words) as caught:
        await program.run(backend=backend)
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)
    assert reached == ["before"]
    assert not backend.requests
    with pytest.raises(sgl.InvalidArgument, match=words):
        await program.run(backend=backend, **{field: value})


RANGES = {
    "temperature": (0.0, math.inf),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}


@given(st.sampled_from(sorted(RANGES)), st.floats())
def test_floats_pass_exactly_within_their_range(field: str, value: float) -> None:
    low, high = RANGES[field]
    if low <= value <= high and not math.isinf(value):
        assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]
    else:
        with pytest.raises(sgl.InvalidArgument) as caught:
            SamplingParams(**{field: value})  # type: ignore[arg-type]
        assert caught.value.field == field


@given(st.integers(), st.integers())
def test_whole_numbers_pass_exactly_within_their_range(tokens: int, top_k: int) -> None:
    if tokens >= 0 and (top_k >= 1 or top_k == -1):
        params = SamplingParams(max_tokens=tokens, top_k=top_k)
        assert (params.max_tokens, params.top_k) == (tokens, top_k)
    else:
        with pytest.raises(sgl.InvalidArgument):
            SamplingParams(max_tokens=tokens, top_k=top_k)


def test_min_tokens_is_at_most_max_tokens() -> None:
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4
    with pytest.raises(sgl.InvalidArgument, match="min_tokens: must be at most max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_sequences_become_tuples_and_biases_numbers() -> None:
    params = SamplingParams(stop="a", stop_regex=["b"], stop_token_ids=[1], logit_bias={"7": 1})  # type: ignore[dict-item]
    assert (params.stop, params.stop_regex, params.stop_token_ids) == (("a",), ("b",), (1,))
    assert params.logit_bias == {7: 1.0}


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(sgl.InvalidArgument, match="temprature"):
        sgl.gen("x", temprature=0.1)  # type: ignore[call-arg]


@sgl.function
async def ask_plainly(s: sgl.ProgramState) -> str:
    text: str = await s.gen("x")
    return text


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
async def test_both_names_of_max_tokens_are_taken_everywhere(name: str) -> None:
    @sgl.function
    async def by_gen(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", **{name: 2})  # type: ignore[arg-type]
        await s.gen("y", **{name: 2})  # type: ignore[arg-type]

    backend = ScriptedBackend("a b c d")
    state = await by_gen.run(backend=backend)
    assert (state["x"], state["y"]) == ("a b", "a b")
    assert (await ask_plainly.run(backend=backend, **{name: 2}))["x"] == "a b"
    assert (await ask_plainly(backend=backend, **{name: 2}))["x"] == "a b"
    [state] = await ask_plainly.run_batch([{}], backend=backend, **{name: 2})  # type: ignore[arg-type]
    assert state["x"] == "a b"
    async with ask_plainly.stream(backend=backend, **{name: 2}) as run:
        assert "".join([piece async for piece in run.text("x")]) == "a b"
    assert [r.sampling.max_tokens for r in backend.requests] == [2] * 6


async def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(sgl.InvalidArgument, match="give one of them"):
        sgl.gen("x", max_tokens=1, max_new_tokens=2)
    with pytest.raises(sgl.InvalidArgument, match="give one of them"):
        await ask_plainly.run(backend=ScriptedBackend(), max_tokens=1, max_new_tokens=2)


async def test_the_gens_value_wins_over_the_runs() -> None:
    @sgl.function
    async def two(s: sgl.ProgramState) -> None:
        s += sgl.gen("own", max_tokens=1, temperature=0.0)
        s += sgl.gen("run")

    backend = ScriptedBackend("x")
    await two.run(backend=backend, max_tokens=9, temperature=0.7, top_p=0.5)
    own, run = (request.sampling for request in backend.requests)
    assert (own.max_tokens, own.temperature, own.top_p) == (1, 0.0, 0.5)
    assert (run.max_tokens, run.temperature, run.top_p) == (9, 0.7, 0.5)
    assert own.seed is None, "what nobody sets is the backend's to choose"


async def test_min_tokens_of_a_gen_against_max_tokens_of_the_run() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", min_tokens=8)

    with pytest.raises(sgl.InvalidArgument, match="min_tokens"):
        await program.run(backend=ScriptedBackend("x"), max_tokens=4)


@given(
    st.dictionaries(st.sampled_from(["max_tokens", "n", "seed"]), st.integers(1, 9)),
    st.dictionaries(st.sampled_from(["max_tokens", "n", "seed"]), st.integers(1, 9)),
)
def test_merging_takes_every_set_field_of_the_winner(
    low: dict[str, int], high: dict[str, int]
) -> None:
    merged = SamplingParams(**low).merged(SamplingParams(**high))  # type: ignore[arg-type]
    assert merged == SamplingParams(**{**low, **high})  # type: ignore[arg-type]
    assert set(merged.given()) == {*low, *high}


async def test_n_answers_are_a_list_everywhere() -> None:
    @sgl.function
    async def several(s: sgl.ProgramState) -> object:
        s += "Say:" + sgl.gen("x", n=3)
        return await s["x"], [meta.finish_reason for meta in await s.meta("x")]

    backend = ScriptedBackend([["a", "b b", "c"]])
    state = await several.run(backend=backend)
    assert state["x"] == state.value("x") == ["a", "b b", "c"]
    assert [meta.completion_tokens for meta in state.meta("x")] == [1, 2, 1]
    assert state.return_value == (["a", "b b", "c"], ["stop"] * 3)
    assert state.text() == "Say:a", "the first answer goes on in the text"
    assert backend.requests[0].sampling.n == 3


async def test_a_list_cannot_be_appended_as_text() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", n=2)
        s += s["x"]

    with pytest.raises(sgl.ProgramError, match="'x' is a list"):
        await program.run(backend=ScriptedBackend("a"))


def test_the_length_may_be_given_by_position() -> None:
    node = sgl.gen("x", 16)
    assert isinstance(node, Gen)
    assert node.sampling.max_tokens == 16
    with pytest.raises(sgl.InvalidArgument, match="max_tokens"):
        sgl.gen("x", 16, max_tokens=4)
    with pytest.raises(sgl.InvalidArgument, match="max_new_tokens"):
        sgl.gen("x", 16, max_new_tokens=4)
