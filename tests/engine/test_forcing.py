"""Forced tokens save steps and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.loading import load
from asyncsgl_engine.request import Delta, Grammar, Request, Sampling

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


def test_tokens_are_the_same_with_and_without_forcing() -> None:
    loaded = load(
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
    # Requests for log-probabilities are drawn a token at a time.
    single = [replace(request, return_logprob=True) for request in asked]
    try:
        forced, few = run(loaded.core, asked)
        drawn, many = run(loaded.core, single)
    finally:
        loaded.constraints.close()
    assert few < many
    for name, delta in forced.items():
        assert delta.token_ids == drawn[name].token_ids, name
        assert delta.text == drawn[name].text


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
    loaded = load(config, _quiet, _quiet)
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
