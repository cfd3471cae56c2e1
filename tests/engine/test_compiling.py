"""Grammars are compiled beside the engine's thread, once, and none can end the process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from itertools import islice, pairwise, product
from pathlib import Path
from string import ascii_lowercase

import pytest

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.errors import Closed, InvalidRequest
from asyncsgl_engine.request import Grammar, Request, Sampling

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

BRIEF = Sampling(max_new_tokens=8, temperature=1.0, seed=1)
LONG = Sampling(max_new_tokens=1500, temperature=0.0, ignore_eos=True)


def chain_of_rules(length: int) -> Grammar:
    """Rules that refer to one another in a row: about a second's work for a compiler."""
    names = (
        "x" + "".join(t) for size in range(1, 5) for t in product(ascii_lowercase, repeat=size)
    )
    rules = list(islice(names, length))
    lines = [f'{one}:("a" {other})?' for one, other in pairwise(rules)]
    return Grammar("ebnf", "\n".join([f"start:{rules[0]}", *lines, f'{rules[-1]}:"a"']))


def chain_of_references(length: int) -> Grammar:
    """A schema whose definitions refer to one another in a row."""
    definitions = {
        f"d{number}": {"properties": {"a": {"$ref": f"#/$defs/d{(number + 1) % length}"}}}
        for number in range(length)
    }
    return Grammar("json_schema", json.dumps({"$ref": "#/$defs/d0", "$defs": definitions}))


SLOW = chain_of_rules(14_000)


@pytest.fixture
async def engine(model_folder: Callable[[str], Path]) -> AsyncIterator[AsyncEngine]:
    """A running engine; its pages must be back at the end."""
    config = EngineConfig(str(model_folder("llama")), dtype="float32", max_total_tokens=4000)
    async with AsyncEngine(config) as running:
        yield running
        await running.check()
        assert running.statistics().pages_held == 0
        assert running.statistics().running == 0


@pytest.mark.parametrize("grammar", [SLOW, chain_of_references(3000)], ids=["rules", "references"])
async def test_long_chains_do_not_end_the_process(engine: AsyncEngine, grammar: Grammar) -> None:
    answer = await engine.generate(Request("r", tuple(b"x"), BRIEF, grammar=grammar))
    assert answer.finish.completion_tokens > 0


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar("json_schema", '{"a":' * 40_000), "too deeply"),
        (Grammar("json_schema", json.dumps({"enum": ["x" * 300_000]})), "at most 262,144"),
        (Grammar("ebnf", 'root ::= "a"' + ' | "a"' * 8_000), "at most 32,768"),
        (Grammar("regex", "(" * 5000 + ")" * 5000), "too deep"),
        (Grammar("ebnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "recursion"),
    ],
    ids=["nested", "large", "gbnf", "regex", "ebnf"],
)
async def test_what_is_too_much_is_refused_and_the_engine_goes_on(
    engine: AsyncEngine, grammar: Grammar, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await engine.generate(Request("bad", tuple(b"x"), BRIEF, grammar=grammar))
    good = Grammar("regex", r"\d{3}")
    assert (await engine.generate(Request("good", tuple(b"x"), BRIEF, grammar=good))).text


async def test_others_go_on_while_a_grammar_is_compiled(engine: AsyncEngine) -> None:
    running = engine.stream(Request("long", tuple(b"abc"), LONG, stream=True))
    await anext(running)
    waiting = asyncio.create_task(
        engine.generate(Request("slow", tuple(b"x"), BRIEF, grammar=SLOW))
    )
    meanwhile = 0
    async for delta in running:
        if waiting.done():
            break
        meanwhile += len(delta.token_ids)
    await waiting
    await running.aclose()
    assert meanwhile > 20


async def test_one_that_is_given_up_while_it_is_compiled(engine: AsyncEngine) -> None:
    waiting = asyncio.create_task(
        engine.generate(Request("slow", tuple(b"x"), BRIEF, grammar=SLOW))
    )
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    # Its id is free at once, and what was compiled for it serves another.
    answer = await engine.generate(Request("slow", tuple(b"x"), BRIEF, grammar=SLOW))
    assert answer.finish.completion_tokens > 0
    assert engine.statistics().finished == 1


@pytest.mark.parametrize("grammar", [None, SLOW], ids=["queued", "compiling"])
async def test_an_abort_before_the_engine_saw_it(
    engine: AsyncEngine, grammar: Grammar | None
) -> None:
    waiting = asyncio.create_task(
        engine.generate(Request("r", tuple(b"xyz"), LONG, grammar=grammar))
    )
    await asyncio.sleep(0)
    engine.abort("r")
    finish = (await waiting).finish
    assert finish.reason == "abort"
    assert finish.prompt_tokens == 3


async def test_flushing_waits_for_those_that_wait_for_their_grammar(engine: AsyncEngine) -> None:
    waiting = asyncio.create_task(
        engine.generate(Request("slow", tuple(b"x"), BRIEF, grammar=SLOW))
    )
    await asyncio.sleep(0)
    assert await engine.flush_cache(wait=True)
    assert engine.statistics().finished == 1
    await waiting


async def test_a_malformed_one_among_others_fails_alone(engine: AsyncEngine) -> None:
    sources = [r"\d{3}"] * 9 + ["("]
    requests = [
        Request(f"r{number}", tuple(b"x"), BRIEF, grammar=Grammar("regex", source))
        for number, source in enumerate(sources)
    ]
    results = await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)
    assert [isinstance(result, InvalidRequest) for result in results] == [False] * 9 + [True]


async def test_closing_does_not_leave_those_waiting_that_are_compiled(
    model_folder: Callable[[str], Path],
) -> None:
    engine = AsyncEngine(EngineConfig(str(model_folder("llama")), max_total_tokens=1000))
    await engine.start()
    waiting = [
        asyncio.create_task(engine.generate(Request(name, tuple(b"x"), BRIEF, grammar=grammar)))
        for name, grammar in (("one", SLOW), ("two", chain_of_references(2000)))
    ]
    await asyncio.sleep(0)
    await engine.aclose()
    for task in waiting:
        with pytest.raises(Closed):
            await task
