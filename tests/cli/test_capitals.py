"""The first command of the README, with the real default model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Command

EXAMPLES = Path(__file__).parents[2] / "examples"
CAPITALS = [
    "Paris",
    "Berlin",
    "Rome",
    "Madrid",
    "Lisbon",
    "Tokyo",
    "Beijing",
    "Moscow",
    "London",
    "Athens",
    "Cairo",
    "Ottawa",
    "Canberra",
    "Delhi",
    "Oslo",
    "Stockholm",
    "Copenhagen",
    "Warsaw",
    "Vienna",
    "Dublin",
    "Budapest",
    "Lima",
    "Bangkok",
    "Ankara",
]


@pytest.mark.timeout(600)  # the model may have to be fetched
def test_most_capitals_are_right_and_a_second_run_has_nothing_to_do(command: Command) -> None:
    pytest.importorskip("torch", reason="the extra 'engine' is not installed")
    shutil.copy(EXAMPLES / "capitals.jsonl", command.folder)
    done = command("batch", "capitals.jsonl", "--max-tokens", "24")
    assert done.status == 0, done.err
    results = command.results("capitals.out.jsonl")
    answers = [result["variables"]["answer"] for result in results]
    right = [city in answer for city, answer in zip(CAPITALS, answers, strict=True)]
    assert sum(right[:20]) >= 12, answers
    again = command("batch", "capitals.jsonl", "--max-tokens", "24")
    assert again.status == 0
    assert "Loading" not in again.err
    assert command.results("capitals.out.jsonl") == results
