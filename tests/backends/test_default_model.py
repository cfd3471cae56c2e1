"""The default model under constraints: 200 random schemas, 50 regular expressions, types."""

from __future__ import annotations

import asyncio
import enum
import random
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema
import pydantic
import pytest

import asyncsgl as sgl

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def loaded() -> Iterator[sgl.Runtime]:
    """The default model, fetched if this machine does not have it."""
    runtime = sgl.Runtime(max_total_tokens=65536)
    asyncio.run(runtime.start())
    yield runtime
    runtime.shutdown()


@pytest.fixture
async def runtime(loaded: sgl.Runtime) -> AsyncIterator[sgl.Runtime]:
    yield loaded
    assert loaded.statistics()["pages_held"] == 0


# -- schemas ------------------------------------------------------------------------------


def random_schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose every value is short."""
    kinds = ["integer", "number", "boolean", "string", "enum", "const", "null", "anyOf"]
    kind = dice.choice([*kinds, *["object", "array"] * (2 if depth < 2 else 0)])
    match kind:
        case "integer":
            return {"type": "integer", "minimum": dice.randint(-99, 0), "maximum": 999}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": dice.randint(1, 99), "multipleOf": 1}
        case "string":
            return random_string(dice)
        case "enum":
            return {"enum": dice.sample(["red", "green", "blue", 1, 2.5, None, True], 3)}
        case "const":
            return {"const": dice.choice(["yes", 7, False])}
        case "anyOf":
            return {"anyOf": [{"type": "null"}, random_string(dice)]}
        case "object":
            return random_object(dice, depth)
        case "array":
            items = random_schema(dice, depth + 1)
            return {"type": "array", "items": items, "minItems": 1, "maxItems": dice.randint(1, 3)}
        case plain:
            return {"type": plain}


def random_string(dice: random.Random) -> dict[str, Any]:
    if dice.random() < 0.3:
        return {"type": "string", "pattern": "^[a-z]{2,6}$"}
    return {"type": "string", "minLength": dice.randint(0, 2), "maxLength": dice.randint(3, 12)}


def random_object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(["name", "age", "tags", "city", "a b", "größe", "x"], dice.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(dice, depth + 1) for name in names},
        "required": dice.sample(names, dice.randint(1, len(names))),
        "additionalProperties": False,
    }


@sgl.function
async def fill(s: sgl.ProgramState, schema: dict[str, Any]) -> None:
    s += sgl.user("Give some JSON.")
    s += sgl.assistant(sgl.gen("value", json_schema=schema, max_tokens=400))


async def test_200_random_schemas_are_met(runtime: sgl.Runtime) -> None:
    dice = random.Random(1)
    schemas = [random_object(dice, 0) for _ in range(200)]
    rows = [{"schema": schema} for schema in schemas]
    states = await fill.run_batch(rows, backend=runtime, temperature=1.0, seed=3)
    for schema, state in zip(schemas, states, strict=True):
        assert state.meta("value").finish_reason == "stop"
        jsonschema.validate(state.value("value"), schema)


# -- regular expressions -----------------------------------------------------------------

REGEXES = (
    *(rf"[a-z]{{{count}}}" for count in range(1, 11)),
    *(rf"(ab){{{count}}}|[xyz]{{2,{count + 2}}}" for count in range(1, 11)),
    *(rf"\d{{{count}}}-\w{{1,{count}}}" for count in range(1, 11)),
    r"(yes|no|perhaps)",
    r"\d{1,3}(\.\d{1,3}){3}",
    r"[A-Z][a-z]{1,8} [A-Z][a-z]{1,8}",
    r"(19|20)\d{2}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"#[0-9a-fA-F]{6}",
    r"\+?\d{2} \d{3} \d{4}",
    r"[^\s@]{1,8}@[a-z]{1,8}\.(com|org)",
    r"(?:true|false)(?:, (?:true|false)){0,3}",
    r'"[a-z ]{0,12}"',
    r"\{\"a\": [0-9]{1,2}\}",
    r"[-+]?[0-9]{1,4}(\.[0-9]{1,2})?",
    r"(a|b(c|d){1,2}){1,3}",
    r"Paris|London|Rom[ae]",
    r"[aeiou]{3}[^aeiou\s]{3}",
    r"\w{1,5}\s\w{1,5}[.!?]",
    r"(é|ü|ß){1,4}",
    r"[\u4e00-\u4e05]{1,3}",
    r"(0x[0-9a-f]{1,4};){1,3}",
    r"\(\d{3}\) \d{3}-\d{4}",
    r"[01]{8}",
)


@sgl.function
async def match(s: sgl.ProgramState, regex: str) -> None:
    s += sgl.user("Say anything.")
    s += sgl.assistant(sgl.gen("text", regex=regex, max_tokens=64))


async def test_50_regular_expressions_match_in_full(runtime: sgl.Runtime) -> None:
    assert len(set(REGEXES)) == 50
    rows = [{"regex": regex} for regex in REGEXES]
    states = await match.run_batch(rows, backend=runtime, temperature=1.0, seed=5)
    for regex, state in zip(REGEXES, states, strict=True):
        assert re.fullmatch(regex, state["text"]), (regex, state["text"])


# -- types ----------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: int
    y: bool


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    capital: bool


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (int, int),
        (float, float),
        (bool, bool),
        (Literal["a", "b"], str),
        (Literal[1, 2], int),
        (Colour, Colour),
        (Point, Point),
        (City, City),
    ],
)
async def test_types_give_values_of_the_type(runtime: sgl.Runtime, dtype: Any, kind: type) -> None:
    @sgl.function
    async def typed(s: sgl.ProgramState) -> None:
        s += sgl.user("Answer.")
        s += sgl.assistant("It is " + sgl.gen("x", dtype=dtype, max_tokens=60))

    state = await typed.run(backend=runtime, temperature=0)
    assert type(state.value("x")) is kind


async def test_a_value_that_is_cut_off_says_so(runtime: sgl.Runtime) -> None:
    @sgl.function
    async def short(s: sgl.ProgramState) -> None:
        s += sgl.user("Where are you?")
        s += sgl.assistant(sgl.gen("x", dtype=City, max_tokens=3))

    state = await short.run(backend=runtime, temperature=0)
    assert state.meta("x").finish_reason == "length"
    with pytest.raises(sgl.OutputError, match="max_tokens"):
        state.value("x")


async def test_an_ebnf_grammar_is_met(runtime: sgl.Runtime) -> None:
    @sgl.function
    async def sums(s: sgl.ProgramState) -> None:
        s += "Sum: " + sgl.gen(
            "x", ebnf='start: DIGIT ("+" DIGIT)~2\nDIGIT: /[0-9]/', max_tokens=32
        )

    state = await sums.run(backend=runtime, temperature=1, seed=1)
    assert re.fullmatch(r"\d\+\d\+\d", state["x"])


async def test_a_grammar_that_is_none_is_refused(runtime: sgl.Runtime) -> None:
    @sgl.function
    async def broken(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", ebnf="start: nowhere")

    with pytest.raises(sgl.BadRequestError, match="nowhere"):
        await broken.run(backend=runtime)
