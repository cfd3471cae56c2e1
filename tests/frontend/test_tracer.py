"""Programs traced without a backend, and the text that all of their runs begin with."""

from __future__ import annotations

import asyncio

import pytest

import asyncsgl as sgl
from asyncsgl.lang.expr import Gen, RoleBegin, RoleEnd, Select, TextNode
from asyncsgl.program.tracer import TracedFork, TracedJoin
from asyncsgl.testing import ScriptedBackend


@sgl.function
async def advise(s: sgl.ProgramState, topic: str, count: int = 2) -> str:
    s += sgl.system("You are brief.")
    s += sgl.user(f"Tips on {topic}.")
    s += sgl.assistant(sgl.gen("tips", max_tokens=8))
    async with s.fork(count) as branches:
        for index, branch in enumerate(branches):
            branch += sgl.user(f"Expand {index}: {await s['tips']}")
            branch += sgl.assistant(sgl.gen("detail"))
    verdict: str = await s.select("good", ["yes", "no"])
    return verdict


def test_a_trace_has_the_nodes_in_order() -> None:
    nodes = advise.trace(topic="tea")
    assert nodes[0] == RoleBegin("system")
    assert TextNode("Tips on tea.") in nodes
    [tips] = [node for node in nodes if isinstance(node, Gen)]
    assert (tips.name, tips.sampling.max_tokens) == ("tips", 8)
    [fork] = [node for node in nodes if isinstance(node, TracedFork)]
    assert fork.branches[1][1] == TextNode("Expand 1: \ue000tips\ue001")
    assert [type(node) for node in fork.branches[0]][-3:] == [RoleBegin, Gen, RoleEnd]
    assert nodes[-2] == TracedJoin("gather_variable")
    assert isinstance(nodes[-1], Select)


def test_what_is_not_given_is_named_in_the_text() -> None:
    assert TextNode("Tips on \ue000topic\ue001.") in advise.trace(count=1)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(sgl.InvalidArgument, match="colour"):
        advise.trace(colour="red")


def test_plain_functions_are_traced_too() -> None:
    @sgl.function
    def plain(s: sgl.ProgramState, question: str) -> None:
        s += question + sgl.gen("a")
        s += sgl.gen("b", choices=["x", "y"])

    assert [type(node) for node in plain.trace()] == [TextNode, Gen, Select]


def test_waiting_for_something_else_cannot_be_traced() -> None:
    @sgl.function
    async def sleeps(s: sgl.ProgramState) -> None:
        s += "before"
        await asyncio.sleep(1)

    with pytest.raises(sgl.ProgramError, match="cannot be traced"):
        sleeps.trace()


def test_what_the_program_raises_is_raised() -> None:
    @sgl.function
    async def fails(s: sgl.ProgramState) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fails.trace()


@pytest.mark.anyio
async def test_the_constant_prefix_is_computed_on_the_backend() -> None:
    backend = ScriptedBackend()
    prefix = await advise.cache(backend=backend)
    assert prefix == "SYSTEM:You are brief.\nUSER:Tips on "
    assert backend.requests[0].text == prefix
    bound = advise.bind(topic="tea")
    assert await bound.cache(backend=backend) == (
        "SYSTEM:You are brief.\nUSER:Tips on tea.\nASSISTANT:"
    )


@pytest.mark.anyio
async def test_no_constant_prefix_sends_nothing() -> None:
    @sgl.function
    async def direct(s: sgl.ProgramState, question: str) -> None:
        s += question
        s += sgl.gen("x")

    backend = ScriptedBackend()
    assert await direct.cache(backend=backend) == ""
    assert backend.requests == []


@pytest.mark.anyio
async def test_a_program_that_fails_on_placeholders_has_a_prefix_all_the_same() -> None:
    @sgl.function
    async def counts(s: sgl.ProgramState, number: str) -> None:
        s += "The number is "
        s += str(int(number) + 1)

    assert await counts.cache(backend=ScriptedBackend()) == "The number is "
