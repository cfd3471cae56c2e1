"""Forced tokens save steps and change nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.constraints import Follower
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.delivery import joined
from asyncsgl_engine.request import Delta, Grammar, Request, Sampling
from asyncsgl_engine.starting import start
from tests.engine.expected import Oracle
from tests.engine.mix import assert_fits
from tests.engine.stage import AHEAD, APART, ASIDE, Stage, Way

# The first test that needs the default model may have to fetch it.
pytestmark = pytest.mark.timeout(300)

CUSTOMER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 16},
        "subscription_status": {"enum": ["active", "suspended"]},
        "date_of_birth": {"type": "string", "format": "date"},
    },
    "required": ["full_name", "subscription_status", "date_of_birth"],
    "additionalProperties": False,
}
GRAMMARS = (
    Grammar("json_schema", json.dumps(CUSTOMER)),
    Grammar(
        "regex", r"The capital of (France|Spain) is (Paris|Madrid), with \d{1,3},\d{3} people\."
    ),
    Grammar("ebnf", 'start: "Answer: " ("yes, certainly" | "no") ". Because: " /[a-z ]{5,30}/ "."'),
)


def _quiet(*_: object) -> None:
    """Nobody asked for progress, and no process is lost here."""


def run(core: EngineCore, requests: Sequence[Request]) -> tuple[dict[str, Delta], int]:
    """The answers, and the forward passes they took."""
    before = core.statistics().steps
    made = core.step(requests)
    while core.busy:
        made += core.step()
    assert [delta.error for delta in made] == [None] * len(requests)
    return {delta.request_id: delta for delta in made}, core.statistics().steps - before


def test_tokens_are_the_same_with_and_without_forcing(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = start(
        EngineConfig(dtype="float32", max_total_tokens=4000, num_threads=1), _quiet, _quiet
    )
    prompt = tuple(loaded.tokenizer.encode("Tell me about a customer of a bakery.\n"))
    asked = [
        Request(
            f"{number} {temperature}",
            prompt,
            Sampling(max_new_tokens=60, temperature=temperature, top_k=5, seed=5),
            grammar,
        )
        for number, grammar in enumerate(GRAMMARS)
        for temperature in (0.0, 0.8)
    ]
    scored = [replace(request, return_logprob=True, top_logprobs_num=2) for request in asked]
    try:
        forced, few = run(loaded.core, asked)
        told, steps = run(loaded.core, scored)
        monkeypatch.setattr(Follower, "forced", lambda _: [])
        drawn, many = run(loaded.core, scored)
    finally:
        loaded.resources.close()
    assert few <= steps <= few + 1  # the last tokens' logits may take a step more
    assert steps < many
    for name, delta in drawn.items():
        assert forced[name].token_ids == told[name].token_ids == delta.token_ids, name
        assert forced[name].text == told[name].text == delta.text
        assert joined([forced[name]]).finish.reason == joined([told[name]]).finish.reason
        for mine, theirs in zip(told[name].logprobs, delta.logprobs, strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=2e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


FORCING = (
    Grammar("regex", r"(left|right): ((xa|yb|zc){3}[a-c]{2} and so it goes on){2}"),
    Grammar("regex", r"(one|two) ends with what is forced"),
    Grammar("regex", r"[ab]c"),
)


def scored_requests(chance: random.Random, count: int) -> list[Request]:
    """Constrained requests, several to a prompt, most of which ask for log-probabilities."""
    made: list[Request] = []
    while len(made) < count:
        prompt = tuple(chance.randrange(257) for _ in range(chance.randint(1, 20)))
        sampling = Sampling(
            max_new_tokens=chance.choice([1, 4, 9, *[60] * 6]),
            temperature=chance.choice([0.0, 1.0]),
            seed=chance.randrange(100),
            stop=chance.choice([(), (), ("so it",)]),
        )
        request = Request(
            f"r{len(made)}",
            prompt,
            sampling,
            chance.choice([*FORCING, None]),
            stream=chance.random() < 0.5,
            return_logprob=chance.random() < 0.8,
            cache_salt=chance.choice([None, "other"]),
            priority=chance.choice([0, 0, 1]),
        )
        if request.return_logprob:
            start = chance.choice([-1, 0, len(prompt) - 1])
            request = replace(request, logprob_start_len=start, top_logprobs_num=2)
        siblings = range(chance.randint(1, 3))
        made += [replace(request, request_id=f"{request.request_id}-{n}") for n in siblings]
    return made


@pytest.mark.parametrize("way", [APART, AHEAD, ASIDE], ids=["apart", "ahead", "aside"])
@pytest.mark.parametrize(("budget", "page_size"), [(5, 4), (64, 1), (64, 8)])
def test_what_is_told_of_forced_tokens_is_the_models_own(
    model_folder: Callable[[str], Path], way: Way, budget: int, page_size: int
) -> None:
    """In small memory, with shared prefixes and cancels: whatever was told, transformers says."""
    folder = model_folder("llama")
    oracle = Oracle.load(folder)
    chance = random.Random(budget + page_size)
    requests = scored_requests(chance, 60)
    deltas: dict[str, list[Delta]] = {request.request_id: [] for request in requests}
    sizes = {"chunked_prefill_size": budget, "page_size": page_size, "max_total_tokens": 96}
    with closing(Stage(folder)) as stage:
        core = stage.core(way, *FORCING, **sizes, max_running_requests=6)
        coming = list(requests)
        while coming or core.busy:
            new = [coming.pop() for _ in range(min(chance.randint(0, 2), len(coming)))]
            cancelled = [f"r{chance.randrange(500)}-0"]
            for delta in core.step(new, cancelled):
                deltas[delta.request_id].append(delta)
        assert core.statistics().preemptions > 0
    for request in requests:
        some = deltas[request.request_id]
        assert all(
            len(delta.logprobs) == len(delta.token_ids) for delta in some if request.return_logprob
        )
        answer = joined(some)
        if not request.sampling.stop:  # which cuts what a grammar asks for
            assert_fits(request, answer)
        if answer.finish.reason != "abort":
            oracle.check_logprobs(request, answer)


@pytest.mark.parametrize("budget", [7, 64])
def test_forced_tokens_keep_to_the_budget_of_a_step(
    model_folder: Callable[[str], Path], budget: int
) -> None:
    config = EngineConfig(
        str(model_folder("llama")),
        dtype="float32",
        max_total_tokens=2000,
        chunked_prefill_size=budget,
        debug_check=True,
    )
    loaded = start(config, _quiet, _quiet)
    core, text = loaded.core, "so it was said, " * 4
    request = Request(
        "r", (1, 2, 3), Sampling(max_new_tokens=200), Grammar("regex", text + "(yes|no), sir")
    )
    try:
        made = core.step([request])
        most, before = 0, core.statistics().computed_tokens
        while core.busy:
            made += core.step()
            now = core.statistics().computed_tokens
            most, before = max(most, now - before), now
    finally:
        loaded.constraints.close()
    assert made[-1].text in (f"{text}yes, sir", f"{text}no, sir")
    assert most <= budget
    assert most > budget // 2
    assert core.statistics().steps < len(made[-1].token_ids) / 3
