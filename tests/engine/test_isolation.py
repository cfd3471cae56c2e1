"""Rows that make a pass fail, or give no numbers, end alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.delivery import joined
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.errors import StepFailed
from asyncsgl_engine.isolation import Trial
from asyncsgl_engine.request import Delta, Request, Sampling
from asyncsgl_engine.sequence import Sequence
from tests.engine.conftest import byte_tokenizer
from tests.engine.stage import AHEAD, APART, ASIDE, Stage, Way

POISON = 254
GREEDY = Sampling(max_new_tokens=10, temperature=0.0, ignore_eos=True)
WAYS = pytest.mark.parametrize("way", [APART, AHEAD, ASIDE], ids=["apart", "ahead", "aside"])
SMALL = {"page_size": 4, "max_total_tokens": 400, "chunked_prefill_size": 24}


@pytest.fixture
def stage(model_folder: Callable[[str], Path]) -> Iterator[Stage]:
    with closing(Stage(model_folder("llama"))) as made:
        yield made


def poisonous(stage: Stage, token: int) -> None:
    """Let the model raise where it is given a token."""

    def refuse(_: Any, given: tuple[torch.Tensor]) -> None:
        if bool((given[0] == token).any()):
            raise RuntimeError("that token is not to be had")

    module: Any = stage.model.module
    module.get_input_embeddings().register_forward_pre_hook(refuse)


def run(core: EngineCore, *arrivals: list[Request]) -> dict[str, list[Delta]]:
    """All deltas of requests that come a step after another."""
    deltas: dict[str, list[Delta]] = {}
    waiting = list(arrivals)
    for _ in range(2000):
        if not waiting and not core.busy:
            break
        for delta in core.step(waiting.pop(0) if waiting else []):
            deltas.setdefault(delta.request_id, []).append(delta)
    assert not core.busy
    assert core.statistics().pages_held == 0
    return deltas


def answers(deltas: dict[str, list[Delta]]) -> dict[str, tuple[int, ...]]:
    """The tokens of those that ended well."""
    return {
        name: joined(some).token_ids for name, some in deltas.items() if some[-1].finish is not None
    }


def failures(deltas: dict[str, list[Delta]]) -> dict[str, str]:
    """What was said to those that did not."""
    for some in deltas.values():
        assert some[-1].error is None or isinstance(some[-1].error, StepFailed)
    return {name: str(some[-1].error) for name, some in deltas.items() if some[-1].error}


def prompts(count: int) -> list[Request]:
    """Prompts of different lengths, the first half of which begin alike."""
    made = []
    for number in range(count):
        common = tuple(range(40, 40 + 9 * (number % 2)))
        own = tuple(7 * number + place for place in range(3 + 5 * (number % 4)))
        made.append(Request(f"r{number}", (*common, *own), GREEDY, stream=number % 3 == 0))
    return made


@WAYS
@pytest.mark.parametrize("bad", [[0], [6], [1, 2, 7], list(range(8))], ids=str)
def test_prompts_that_fail_end_alone(stage: Stage, way: Way, bad: list[int]) -> None:
    good = prompts(8)
    expected = answers(run(stage.core(APART, **SMALL), good[:3], [], good[3:]))
    poisonous(stage, POISON)
    asked = [
        replace(one, prompt_ids=(*one.prompt_ids, POISON)) if number in bad else one
        for number, one in enumerate(good)
    ]
    core = stage.core(way, **SMALL)
    deltas = run(core, asked[:3], [], asked[3:])
    failed = failures(deltas)
    assert failed.keys() == {f"r{number}" for number in bad}
    for name, message in failed.items():
        assert repr(name) in message
        assert "that token is not to be had" in message
    assert answers(deltas) == {name: ids for name, ids in expected.items() if name not in failed}
    assert (core.statistics().failed, core.statistics().running) == (len(bad), 0)


@WAYS
def test_a_token_that_fails_in_the_middle_of_an_answer(stage: Stage, way: Way) -> None:
    asked = prompts(8)
    expected = answers(run(stage.core(APART, **SMALL), asked))
    victim, token = unique_token(expected)
    poisonous(stage, token)
    deltas = run(stage.core(way, **SMALL), asked)
    assert failures(deltas).keys() == {victim}
    assert answers(deltas) == {name: ids for name, ids in expected.items() if name != victim}


def unique_token(expected: dict[str, tuple[int, ...]]) -> tuple[str, int]:
    """A token that one answer alone has, neither first nor last in it."""
    asked = {token for request in prompts(8) for token in request.prompt_ids}
    for name, ids in expected.items():
        others = asked.union(*(some for other, some in expected.items() if other != name))
        for token in ids[2:-2]:
            if token not in others and ids.index(token) >= 2:
                return name, token
    raise AssertionError("no answer has a token of its own")


@WAYS
def test_siblings_share_pages_with_the_one_that_fails(stage: Stage, way: Way) -> None:
    """Several answers to one prompt, and forks of it that go on differently."""
    stem = tuple(range(60, 79))
    draws = replace(GREEDY, temperature=1.0)
    same = [Request(f"n{n}", stem, replace(draws, seed=n)) for n in range(4)]
    forks = [Request(f"f{n}", (*stem, 100 + n), GREEDY) for n in range(3)]
    bad = [Request(f"bad{n}", (*stem, POISON, n), GREEDY) for n in range(2)]
    expected = answers(run(stage.core(APART, **SMALL), [*same, *forks]))
    poisonous(stage, POISON)
    core = stage.core(way, **SMALL)
    deltas = run(core, [*same, bad[0], *forks, bad[1]])
    assert failures(deltas).keys() == {"bad0", "bad1"}
    assert answers(deltas) == expected


@WAYS
def test_those_who_leave_during_the_search_and_those_who_come(stage: Stage, way: Way) -> None:
    asked = prompts(8)
    expected = answers(run(stage.core(APART, **SMALL), asked))
    poisonous(stage, POISON)
    core = stage.core(way, **SMALL)
    asked[3] = replace(asked[3], prompt_ids=(POISON, 1))
    deltas: dict[str, list[Delta]] = {}
    steps = 0
    while core.busy or not steps:
        cancelled = ["r0", "r3"] if steps == 2 else []
        for delta in core.step(
            asked[:6] if not steps else asked[6:] if steps == 1 else [], cancelled
        ):
            deltas.setdefault(delta.request_id, []).append(delta)
        steps += 1
    assert deltas.keys() == {request.request_id for request in asked}
    left = {"r0", "r3"}
    got = {name: ids for name, ids in answers(deltas).items() if name not in left}
    assert got == {name: ids for name, ids in expected.items() if name not in left}


@WAYS
def test_a_row_without_numbers_ends_alone(stage: Stage, way: Way) -> None:
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}]
    asked = [
        replace(one, sampling=replace(GREEDY, seed=1, **kinds[number % 3]))
        for number, one in enumerate(prompts(8))
    ]
    expected = answers(run(stage.core(APART, **SMALL), asked))
    with torch.no_grad():
        module: Any = stage.model.module
        module.get_input_embeddings().weight[POISON] = torch.nan
    core = stage.core(way, **SMALL)
    scored = Request(
        "scored",
        (1, POISON, 3),
        Sampling(max_new_tokens=0),
        return_logprob=True,
        logprob_start_len=0,
    )
    bad = [replace(asked[n], request_id=f"bad{n}", prompt_ids=(8, POISON, n)) for n in range(3)]
    deltas = run(core, [*asked[:4], *bad, scored], asked[4:])
    assert failures(deltas).keys() == {"bad0", "bad1", "bad2", "scored"}
    assert answers(deltas) == expected
    # Their pages hold no numbers. None is found again, and all may be used again.
    assert core.clear_cache()
    for _ in range(3):
        again = run(core, bad, asked)
        assert answers(again) == expected


def test_what_went_wrong_once_is_not_found_in_the_cache_again(stage: Stage) -> None:
    asked = Request("r", tuple(range(50, 62)), GREEDY)
    mate = replace(asked, request_id="mate", prompt_ids=(*asked.prompt_ids[:8], 1, 2, 3))
    core = stage.core(APART, **SMALL)
    expected = answers(run(stage.core(APART, **SMALL), [asked], [mate]))
    glitches = [True]

    def glitch(_: Any, __: Any, made: torch.Tensor) -> torch.Tensor:
        return made * torch.nan if glitches and glitches.pop() else made

    module: Any = stage.model.module
    module.get_input_embeddings().register_forward_hook(glitch)
    assert failures(run(core, [asked])).keys() == {"r"}
    assert answers(run(core, [asked], [mate])) == expected


@pytest.mark.anyio
@pytest.mark.parametrize("native", [True, False])
async def test_compiled_code_keeps_rows_apart_too(
    tmp_path: Path, model_folder: Callable[[str], Path], native: bool
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = EngineConfig(
        str(tmp_path),
        dtype="float32",
        debug_check=True,
        enable_native=native,
        page_size=4,
        max_total_tokens=120,
    )
    good = prompts(4)
    async with AsyncEngine(config) as engine:
        expected = [(await engine.generate(one)).token_ids for one in good]
        for turn in range(3):
            bad = Request(f"bad{turn}", (8, 9, 10, 11, POISON, 3, 5, 8, 9), GREEDY)
            *got, failed = await asyncio.gather(
                *map(engine.generate, [*good, bad]), return_exceptions=True
            )
            assert isinstance(failed, StepFailed)
            assert [getattr(one, "token_ids", one) for one in got] == expected
        assert engine.statistics().failed == 3


def suspects(count: int) -> list[Sequence]:
    return [Sequence(Request(f"s{n}", (1,)), n, 10, tokens=[1]) for n in range(count)]


@pytest.mark.parametrize(
    ("count", "place"), [(1, 0), (2, 1), (3, 0), (50, 49), (128, 0), (128, 77)]
)
def test_one_culprit_is_found_in_few_groups(count: int, place: int) -> None:
    several = suspects(count)
    trial, tried = Trial(), 1
    culprit = trial.accuse(several)
    while trial:
        tried += 1
        group = list(trial.group)
        if several[place] in group:
            culprit = trial.accuse(group)
        else:
            for sequence in group:
                trial.passed(sequence, 1)
    assert culprit is several[place]
    assert tried <= 2 + 2 * count.bit_length()
