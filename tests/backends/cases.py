"""Programs and helpers that the contract's cases share, whatever backend they run on."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.types import Delta, Generation

RULES = pytest.mark.parametrize(
    "rule",
    [
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    ],
    ids=["normalized", "greedy", "unconditional"],
)
NUMBERS = [
    ("temperature", 0.5),
    ("top_p", 0.5),
    ("top_k", 5),
    ("min_p", 0.1),
    ("frequency_penalty", 0.5),
    ("presence_penalty", 0.5),
    ("repetition_penalty", 1.5),
    ("min_tokens", 2),
    ("ignore_eos", True),
    ("seed", 7),
    ("logprob_start_len", 0),
]
"""Sampling fields, each with a value that changes something."""


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@sgl.function
async def answer(s: sgl.ProgramState, gen: dict[str, Any]) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("Say hello.")
    s += sgl.assistant(sgl.gen("answer", **gen))


@sgl.function
async def talk(s: sgl.ProgramState, gen: dict[str, Any]) -> None:
    s += sgl.system("You are a poet.")
    s += sgl.user("First question?")
    s += sgl.assistant(sgl.gen("one", **gen))
    s += sgl.user("Second question?")
    s += sgl.assistant(sgl.gen("two", **gen))


@sgl.function
async def choose(s: sgl.ProgramState, rule: sgl.ChoicesMethod) -> None:
    s += sgl.user("Is it?")
    with s.assistant():
        s += "I say: " + sgl.select("verdict", ["yes", "no", "maybe"], choices_method=rule)


@sgl.function
async def fork_in_three(s: sgl.ProgramState, gen: dict[str, Any]) -> None:
    s += sgl.user("Go.")
    async with s.fork(3) as branches:
        for branch in branches:
            branch += sgl.assistant(sgl.gen("answer", **gen))


def meta_of(state: sgl.State, name: str = "answer") -> sgl.Meta:
    """The meta of a variable with one answer."""
    meta = state.meta(name)
    assert isinstance(meta, sgl.Meta)
    return meta


def roles_of(state: sgl.State) -> list[str]:
    """Who speaks in each turn."""
    return [message["role"] for message in state.messages()]


async def read(
    deltas: AsyncGenerator[Delta, None], answers: int = 1
) -> tuple[list[list[str]], Generation]:
    """The pieces of each answer, and the generation, which comes last and once."""
    pieces: list[list[str]] = [[] for _ in range(answers)]
    last: Generation | None = None
    async for delta in deltas:
        assert last is None, "nothing comes after the generation"
        if delta.text:
            pieces[delta.index].append(delta.text)
        last = delta.generation
    assert last is not None
    assert ["".join(each) for each in pieces] == [one.text for one in last.completions]
    return pieces, last


async def shown(backend: sgl.Backend, gen: dict[str, Any]) -> str:
    """The text of :data:`answer`, put together from its stream's pieces."""
    async with answer.stream(gen=gen, backend=backend) as running:
        return "".join([piece async for piece in running.text("answer")])
