"""Answers with a step planned during the one before it are those without."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.delivery import joined
from asyncsgl_engine.request import Completion, Delta, Grammar, Request, Sampling, TokenLogprob
from tests.engine.mix import GRAMMARS, Mix, assert_fits
from tests.engine.stage import AHEAD, APART, ASIDE, Stage, Way

LONGEST = 90
GREEDY = Sampling(max_new_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture
def stage(model_folder: Callable[[str], Path]) -> Iterator[Stage]:
    with closing(Stage(model_folder("llama"))) as made:
        yield made


@dataclass(frozen=True)
class Visit:
    """What comes in before a step."""

    new: tuple[Request, ...]
    cancelled: tuple[str, ...]


def visits(seed: int, count: int) -> list[Visit]:
    """Requests of all kinds, alone and as siblings, and some that are cancelled."""
    chance = random.Random(seed)
    mix = Mix(chance, LONGEST)
    made, names = [], []
    for number in range(count):
        new: list[Request] = []
        for each in range(chance.choice([0, 0, 1, 1, 2])):
            name = f"r{number}-{each}"
            new += mix.siblings(name) if chance.random() < 0.3 else [mix.request(name)]
        names += [request.request_id for request in new]
        cancelled = [chance.choice(names)] if names and chance.random() < 0.1 else []
        made.append(Visit(tuple(new), tuple(cancelled)))
    return made


def play(core: EngineCore, script: list[Visit]) -> dict[str, list[Delta]]:
    """All deltas of each request; the books are proven after every step."""
    deltas: dict[str, list[Delta]] = {}
    waiting = list(script)
    for _ in range(10_000):
        if not waiting and not core.busy:
            break
        visit = waiting.pop(0) if waiting else Visit((), ())
        for delta in core.step(visit.new, visit.cancelled):
            deltas.setdefault(delta.request_id, []).append(delta)
    assert not core.busy
    now = core.statistics()
    assert (now.running, now.waiting, now.pages_held) == (0, 0, 0)
    assert now.pages_free + now.pages_cached == now.pages_total
    assert core.clear_cache()
    assert core.statistics().pages_free == now.pages_total
    return deltas


def facts(entries: tuple[TokenLogprob, ...]) -> list[object]:
    """Log-probabilities as they compare: rounding may depend on the batch."""
    return [
        (entry.token_id, pytest.approx(entry.logprob, abs=1e-3), [pair[0] for pair in entry.chosen])
        for entry in entries
    ]


def assert_same(request: Request, one: list[Delta], other: list[Delta], cut: bool) -> None:
    """Two ways gave the same answer; where it was cut short, one may have come further."""
    assert {one[-1].error is None, other[-1].error is None} == {True}, (one[-1], other[-1])
    left, right = joined(one), joined(other)
    assert_fits(request, left)
    assert_fits(request, right)
    if cut and "abort" in (left.finish.reason, right.finish.reason):
        length = min(len(left.token_ids), len(right.token_ids))
        assert left.token_ids[:length] == right.token_ids[:length]
        return
    assert essence(left) == essence(right)


def essence(answer: Completion) -> tuple[object, ...]:
    finish = answer.finish
    return (
        answer.text,
        answer.token_ids,
        (finish.reason, finish.matched, finish.completion_tokens),
        facts(answer.logprobs),
        facts(answer.prompt_logprobs),
    )


SIZES = (
    {"page_size": 4, "chunked_prefill_size": 16, "max_running_requests": 4},
    {"page_size": 1, "chunked_prefill_size": 64, "max_running_requests": 12},
    {"page_size": 16, "chunked_prefill_size": 7, "max_running_requests": 6},
)


@pytest.mark.parametrize("way", [AHEAD, ASIDE], ids=["ahead", "aside"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"page{sizes['page_size']}")
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_steps_apart(
    stage: Stage, way: Way, sizes: dict[str, int], seed: int
) -> None:
    script = visits(seed, 24)
    sizes = sizes | {"max_total_tokens": 96}
    cut = {name for visit in script for name in visit.cancelled}
    expected = play(stage.core(APART, *GRAMMARS, **sizes), script)
    core = stage.core(way, *GRAMMARS, **sizes)
    got = play(core, script)
    requests = {request.request_id: request for visit in script for request in visit.new}
    assert got.keys() == expected.keys() == requests.keys()
    for name, request in requests.items():
        assert_same(request, expected[name], got[name], name in cut)


@pytest.mark.parametrize("way", [AHEAD, ASIDE], ids=["ahead", "aside"])
def test_who_loses_its_place_loses_no_token(stage: Stage, way: Way) -> None:
    long = replace(GREEDY, max_new_tokens=40)
    script = [Visit((Request(f"r{n}", (n, 60), long, priority=n),), ()) for n in range(4)]
    expected = play(stage.core(APART, max_total_tokens=400), script)
    core = stage.core(way, max_total_tokens=60, page_size=4)
    got = play(core, script)
    assert core.statistics().preemptions > 2
    assert {name: joined(some).token_ids for name, some in got.items()} == {
        name: joined(some).token_ids for name, some in expected.items()
    }


def test_a_row_that_had_ended_is_wasted_and_no_more(stage: Stage) -> None:
    expected = joined(play(stage.core(APART), [Visit((Request("r", (5, 6), GREEDY),), ())])["r"])
    stops = replace(GREEDY, stop_token_ids=(expected.token_ids[4],))
    core = stage.core(AHEAD)
    (last,) = play(core, [Visit((Request("r", (5, 6), stops),), ())])["r"]
    at = expected.token_ids.index(expected.token_ids[4])
    assert last.token_ids == expected.token_ids[: at + 1]
    assert core.statistics().generated_tokens == at + 1
    assert core.statistics().steps == at + 1  # the wasted pass was not even waited for


@pytest.mark.parametrize("others", [0, 3], ids=["alone", "among others"])
def test_forced_tokens_come_out_whole(stage: Stage, others: int) -> None:
    """Where most rows are free the pass is planned ahead, and forced tokens take its place."""
    grammar = Grammar("regex", r"(left|right): ((xa|yb|zc){9}[a-c]{9}){2}")
    # What is forced weighs on what is drawn later, and what was drawn in its place must not.
    penalised = replace(GREEDY, max_new_tokens=80, frequency_penalty=2.0)
    asked = Request("g", (70, 71), penalised, grammar=grammar)
    free = [Request(f"f{n}", (n, 9), replace(GREEDY, max_new_tokens=30)) for n in range(others)]
    script = [Visit((asked, *free), ())]
    expected = play(stage.core(APART, grammar), script)
    got = play(stage.core(AHEAD, grammar), script)
    assert joined(expected["g"]).text == joined(got["g"]).text
    assert joined(got["g"]).finish.reason == "stop"
    for name in expected:
        assert joined(expected[name]).token_ids == joined(got[name]).token_ids
