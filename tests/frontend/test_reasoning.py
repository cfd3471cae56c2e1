"""Reasoning between think tags is split off, whole or in pieces, for every family."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsgl as sgl
from asyncsgl import events
from asyncsgl.lang.reasoning import FAMILIES, ReasoningSplitter
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Completion

pytestmark = pytest.mark.anyio

PARTS = ["<think>", "</think>", "◁think▷", "◁/think▷", "<", "</", "think>", " ", "\n", "a", "é"]
texts = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


def split(family: str, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(FAMILIES[family])
    pairs = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
    return "".join(pair[0] for pair in pairs), "".join(pair[1] for pair in pairs)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts, cuts=st.lists(st.integers(0, 60)))
def test_any_cutting_gives_the_same_split(family: str, text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert split(family, pieces) == split(family, [text]) == split(family, list(text))


@pytest.mark.parametrize("family", FAMILIES)
@given(reasoning=st.text("ab <>/\n"), answer=st.text("ab <>/\n"))
def test_the_split_undoes_the_tags(family: str, reasoning: str, answer: str) -> None:
    tags = FAMILIES[family]
    text = f"\n{tags.begin}\n{reasoning}\n{tags.end}\n\n{answer}"
    assert split(family, [text]) == (reasoning.strip(), answer.lstrip())
    if tags.starts_open and not reasoning.lstrip().startswith(tags.begin):
        assert split(family, [text.partition(tags.begin)[2]]) == (
            reasoning.strip(),
            answer.lstrip(),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_tags(family: str) -> None:
    expected = ("no tags", "") if FAMILIES[family].starts_open else ("", "no tags")
    assert split(family, ["no tags"]) == expected


@pytest.mark.parametrize("family", FAMILIES)
@given(answer=st.text("ab </think>◁▷\n"), size=st.integers(1, 4))
def test_a_stream_shows_exactly_the_final_texts(family: str, answer: str, size: int) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.separate_reasoning(sgl.gen("x"), family)

    async def watch() -> None:
        backend = ScriptedBackend(Completion(answer), chunk_size=size)
        async with program.stream(backend=backend) as run:
            shown = {"": "", "x": ""}
            async for event in run:
                if isinstance(event, events.Text):
                    shown["x"] += event.text
                elif isinstance(event, events.Reasoning):
                    shown[""] += event.text
            state = await run.result()
        assert (state["x_reasoning_content"], state["x"]) == (shown[""], shown["x"])
        assert (state["x_reasoning_content"], state["x"]) == split(family, [answer])

    asyncio.run(watch())


async def test_every_gen_in_the_expression_is_split() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> str:
        s += sgl.separate_reasoning("1:" + sgl.gen("x") + " 2:" + sgl.gen("y", n=2), "qwen3")
        reasoning: str = await s["x_reasoning_content"]
        return reasoning

    answers = ["<think>a</think>b", ["<think>c</think>d", "e"]]
    state = await program.run(backend=ScriptedBackend(answers))
    assert (state["x"], state.return_value) == ("b", "a")
    assert (state["y"], state["y_reasoning_content"]) == (["d", "e"], ["c", ""])
    assert state.text() == "1:b 2:d", "reasoning is not part of the prompt that goes on"


def test_misuse_is_refused() -> None:
    with pytest.raises(sgl.InvalidArgument, match="unknown 'qwen4'; there is qwen3"):
        sgl.separate_reasoning(sgl.gen("x"), "qwen4")
    with pytest.raises(sgl.ProgramError, match="a gen in it"):
        sgl.separate_reasoning("text", "qwen3")
