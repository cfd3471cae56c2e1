"""``select``: the three scoring rules on plain numbers, and the words around them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsgl as sgl
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import ChoiceScore

pytestmark = pytest.mark.anyio

RULES = [
    sgl.token_length_normalized,
    sgl.greedy_token_selection,
    sgl.unconditional_likelihood_normalized,
]
logprobs = st.lists(st.floats(-50, 0), min_size=1, max_size=6)


def score(values: Sequence[float], alone: Sequence[float] | None = None) -> ChoiceScore:
    free = tuple(alone) if alone is not None else None
    return ChoiceScore("x", tuple(range(len(values))), tuple(values), free)


@st.composite
def scored(draw: st.DrawFn, max_size: int = 12) -> list[ChoiceScore]:
    rows = draw(st.lists(logprobs, min_size=1, max_size=max_size))
    return [
        score(row, draw(st.lists(st.floats(-50, 0), min_size=len(row), max_size=len(row))))
        for row in rows
    ]


@given(scored())
def test_the_mean_logprob_decides(choices: list[ChoiceScore]) -> None:
    decision = sgl.token_length_normalized(choices)
    means = [math.fsum(c.logprobs) / len(c.logprobs) for c in choices]
    assert decision.scores == pytest.approx(means)
    assert decision.scores[decision.index] == max(decision.scores)


@given(scored())
def test_the_mean_against_the_prompt_less_mean_decides(choices: list[ChoiceScore]) -> None:
    decision = sgl.unconditional_likelihood_normalized(choices)
    assert sgl.unconditional_likelihood_normalized.unconditional
    for choice, got in zip(choices, decision.scores, strict=True):
        assert choice.unconditional is not None
        difference = math.fsum(choice.logprobs) - math.fsum(choice.unconditional)
        assert got == pytest.approx(difference / len(choice.logprobs), abs=1e-9)
    assert decision.scores[decision.index] == max(decision.scores)


def greedily(rows: list[list[float]]) -> list[int]:
    """The rule in its other form: sort by position, short rows padded with their mean."""
    longest = max(map(len, rows))
    padded = [row + [sum(row) / len(row)] * (longest - len(row)) for row in rows]
    best = max(padded)
    return [index for index, row in enumerate(padded) if row == best]


@given(
    st.lists(st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0]), min_size=1, max_size=4), min_size=1)
)
def test_greedy_selection_compares_token_by_token(rows: list[list[float]]) -> None:
    decision = sgl.greedy_token_selection([score(row) for row in rows])
    assert decision.index == greedily(rows)[0], "of equal ones the first"
    assert decision.scores[decision.index] == max(decision.scores)


def test_greedy_selection_prefers_the_better_first_token() -> None:
    better_first, better_mean = score([-0.5, -9.0]), score([-0.6, -0.1])
    assert sgl.greedy_token_selection([better_mean, better_first]).index == 1
    assert sgl.token_length_normalized([better_mean, better_first]).index == 0


@pytest.mark.parametrize(
    ("rest", "winner"), [([-1.0], 0), ([-0.1], 1)], ids=["unlikely rest", "likely rest"]
)
def test_a_choice_that_begins_another_is_followed_by_its_mean(
    rest: list[float], winner: int
) -> None:
    start = [-0.2, -0.4]
    assert sgl.greedy_token_selection([score(start), score(start + rest)]).index == winner


@pytest.mark.parametrize("rule", RULES)
def test_a_certain_choice_scores_exactly_zero_and_wins(rule: sgl.ChoicesMethod) -> None:
    certain, likely = score([0.0, 0.0], [0.0, 0.0]), score([-1e-9], [0.0])
    assert rule([likely, certain]).index == 1
    assert sgl.token_length_normalized([certain]).scores == (0.0,)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 200])
def test_one_choice_and_two_hundred(rule: sgl.ChoicesMethod, count: int) -> None:
    choices = [score([-float(count - i)], [0.0]) for i in range(count)]
    decision = rule(choices)
    assert decision.index == count - 1
    assert len(decision.scores) == count


@pytest.mark.parametrize("rule", RULES)
@given(choices=scored())
def test_the_order_of_the_choices_does_not_matter(
    rule: sgl.ChoicesMethod, choices: list[ChoiceScore]
) -> None:
    backwards = rule(choices[::-1])
    assert choices[::-1][backwards.index].logprobs is not None
    best = max(rule(choices).scores)
    assert backwards.scores[backwards.index] == pytest.approx(best)


@pytest.mark.parametrize("rule", RULES)
async def test_the_meta_has_the_scores_of_all_choices(rule: sgl.ChoicesMethod) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> str:
        s += "Sky: "
        chosen: str = await s.select("colour", ["red", "blue", "bluest"], choices_method=rule)
        return chosen

    backend = ScriptedBackend(scores={"blue": -0.5, "red": -2.0})
    state = await program.run(backend=backend)
    assert state["colour"] == state.return_value == "blue"
    meta = state.meta("colour")
    assert meta.choices == ("red", "blue", "bluest")
    assert meta.choice_logprobs == ((-2.0,), (-0.5,), (-10.0,))
    assert len(meta.choice_scores) == 3
    assert meta.backend == "scripted"
    assert state.text() == "Sky: blue"


async def test_gen_with_choices_is_select() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("a", choices=["x", "y"], choices_method=sgl.greedy_token_selection)
        await s.gen("b", choices=["x", "y"])

    state = await program.run(backend=ScriptedBackend(scores={"y": -0.1}))
    assert (state["a"], state["b"]) == ("y", "y")
    with pytest.raises(sgl.InvalidArgument, match="cannot be combined with top_p"):
        sgl.gen("x", choices=["a"], top_p=0.5)
    with pytest.raises(sgl.InvalidArgument, match="cannot be combined with dtype"):
        sgl.gen("x", choices=["a"], dtype=int)
    with pytest.raises(sgl.InvalidArgument, match="only with choices"):
        sgl.gen("x", choices_method=sgl.greedy_token_selection)


@pytest.mark.parametrize(
    "choices", [None, [], "ab", ["a", ""], ["a", 1], ["a", "b", "a"]], ids=repr
)
async def test_unusable_choices_are_refused_at_the_line(choices: object) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.select("x", choices)  # type: ignore[arg-type]

    backend = ScriptedBackend()
    with pytest.raises(sgl.InvalidArgument) as caught:
        await program.run(backend=backend)
    assert caught.value.field == "choices"
    assert not backend.requests


def test_repeated_choices_are_named() -> None:
    with pytest.raises(sgl.InvalidArgument, match="given twice: 'a', 'b'"):
        sgl.select("x", ["a", "b", "a", "c", "b"])


async def test_a_run_does_not_pass_its_sampling_to_a_select() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.select("x", ["a", "b"], temperature=0.3)

    backend = ScriptedBackend()
    await program.run(backend=backend, max_tokens=7, temperature=1.0, seed=3)
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.3, 3, None)


def test_all_rules_agree_on_one_token_choices() -> None:
    for values in itertools.permutations([-0.5, -1.0, -2.0]):
        choices = [score([value], [0.0]) for value in values]
        assert {rule(choices).index for rule in RULES} == {values.index(-0.5)}
