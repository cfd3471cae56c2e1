"""Types, patterns, schemas and grammars: one constraint, and a typed value of the text."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsgl as sgl
from asyncsgl.lang.expr import Gen
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Completion, Constraint

pytestmark = pytest.mark.anyio


class Colour(enum.Enum):
    RED = "red"
    GREEN = "dark-green (a+b)"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 10


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


class Person(pydantic.BaseModel):
    name: str
    age: int


def constraint_of(node: object) -> Constraint:
    assert isinstance(node, Gen)
    assert node.constraint is not None
    return node.constraint


async def value_of(text: str, **arguments: Any) -> Any:
    """The typed value of a gen that answered ``text``, the same inside and after the run."""

    @sgl.function
    async def program(s: sgl.ProgramState) -> Any:
        s += sgl.gen("x", **arguments)
        return await s.value("x")

    state = await program.run(backend=ScriptedBackend(Completion(text)))
    assert state["x"] == text, "the variable is always the text"
    assert state.value("x") == state.return_value
    return state.value("x")


TYPES = [
    (int, "42", 42),
    (int, "-7 ", -7),
    (int, "+5\n", 5),
    (float, "2.5", 2.5),
    (float, "-1e3", -1000.0),
    (float, "3 ", 3.0),
    (bool, "True", True),
    (bool, "False", False),
    (str, '"a \\"b\\" \\n"', 'a "b" \n'),
    (Literal["yes", "no"], "no", "no"),
    (Literal[1, "b", True], "1", 1),
    (Colour, "dark-green (a+b)", Colour.GREEN),
    (Level, "10", Level.HIGH),
    (Point, '{"x": 1, "y": 2}', Point(1, 2.0)),
    (Person, '{"name": "Bo", "age": 3}', Person(name="Bo", age=3)),
    (list[int], "[1,2]", [1, 2]),
]


@pytest.mark.parametrize(("kind", "text", "value"), TYPES, ids=str)
async def test_a_dtype_gives_a_constraint_and_a_typed_value(
    kind: Any, text: str, value: object
) -> None:
    constraint = constraint_of(sgl.gen("x", dtype=kind))
    if constraint.kind == "regex":
        assert re.fullmatch(constraint.source, text)
    else:
        assert json.loads(constraint.source)["type"] in ("object", "array")
    got = await value_of(text, dtype=kind)
    assert got == value
    assert type(got) is type(value)


@given(st.integers(-(10**18) + 1, 10**18 - 1))
def test_every_int_matches_its_pattern(number: int) -> None:
    assert re.fullmatch(constraint_of(sgl.gen(dtype=int)).source, str(number))


@given(st.text(st.characters(exclude_characters='"\\', exclude_categories=["Cc", "Cs"])))
def test_every_plain_string_matches_its_pattern(text: str) -> None:
    assert re.fullmatch(constraint_of(sgl.gen_string()).source, f'"{text}"')


@given(st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1, unique=True))
def test_the_values_of_a_literal_match_and_nothing_else_does(values: list[str]) -> None:
    constraint = constraint_of(sgl.gen(dtype=Literal[tuple(values)]))
    for value in values:
        assert re.fullmatch(constraint.source, value)
    assert not re.fullmatch(constraint.source, "".join(values) + "!")


async def test_a_schema_may_be_a_dict_a_text_or_a_class() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for given_as in (schema, json.dumps(schema)):
        constraint = constraint_of(sgl.gen("x", json_schema=given_as))
        assert (constraint.kind, json.loads(constraint.source)) == ("json_schema", schema)
        assert await value_of('{"a": 1}', json_schema=given_as) == {"a": 1}
    assert await value_of('{"name": "Bo", "age": 3}', json_schema=Person) == Person(
        name="Bo", age=3
    )
    assert constraint_of(sgl.gen("x", json_schema=Person)).label == "Person"


class Anything(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    people: list[Person]


def test_classes_have_no_properties_but_their_own() -> None:
    schema = json.loads(constraint_of(sgl.gen("x", json_schema=Anything)).source)
    assert schema["additionalProperties"] is True, "the class says so itself"
    assert schema["$defs"]["Person"]["additionalProperties"] is False
    given = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert json.loads(constraint_of(sgl.gen("x", json_schema=given)).source) == given


async def test_regex_and_grammar_pass_as_they_are() -> None:
    assert constraint_of(sgl.gen("x", regex="[a-c]+")) == Constraint("regex", "[a-c]+")
    grammar = 'start: "yes" | "no"'
    assert constraint_of(sgl.gen("x", ebnf=grammar)) == Constraint("ebnf", grammar)
    assert await value_of("abc", regex="[a-c]+") == "abc"


def test_gen_int_and_gen_string_are_short_for_types() -> None:
    assert sgl.gen_int("x", max_tokens=3) == sgl.gen("x", dtype=int, max_tokens=3)
    assert sgl.gen_string("x") == sgl.gen("x", dtype=str)


def test_a_number_ends_at_white_space_besides_the_stops_given() -> None:
    node = sgl.gen_int("x", stop=";")
    assert isinstance(node, Gen)
    assert node.sampling.stop == (";", " ", "\n")


class Bare:
    pass


class Empty(enum.Enum):
    pass


BAD: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, "not a regular expression"),
    ({"regex": ""}, "non-empty"),
    ({"regex": 5}, "non-empty"),
    ({"ebnf": "  "}, "non-empty"),
    ({"json_schema": "{"}, "is not JSON"),
    ({"json_schema": {"a": {1, 2}}}, "cannot be written as JSON"),
    ({"json_schema": Bare}, "cannot generate"),
    ({"dtype": Bare}, "cannot generate"),
    ({"dtype": 5}, "cannot generate"),
    ({"dtype": Empty}, "at least one member"),
    ({"dtype": Literal[""]}, "empty text"),
    ({"dtype": Literal[1, "1"]}, "look the same"),
    ({"dtype": Literal[b"x"]}, "no text form"),
    ({"dtype": int, "regex": "a"}, "only one of these"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=str)
def test_what_cannot_be_generated_is_refused_at_the_line(
    arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(sgl.InvalidArgument, match=words) as caught:
        sgl.gen("x", **arguments)
    assert caught.value.field == " and ".join(arguments)


CUT = [(int, "-"), (bool, "Tr"), (str, '"unfinished'), (Person, '{"name": "B'), (Colour, "re")]


@pytest.mark.parametrize(("kind", "text"), CUT, ids=str)
async def test_a_cut_off_text_has_no_value_and_says_so(kind: Any, text: str) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", dtype=kind, max_tokens=2)
        with pytest.raises(sgl.OutputError, match="cut off by max_tokens"):
            await s.value("x")

    state = await program.run(backend=ScriptedBackend(Completion(text, "length")))
    assert state["x"] == text
    assert "cut off by max_tokens" in state.meta("x").error
    with pytest.raises(sgl.OutputError, match="cut off by max_tokens"):
        state.value("x")


async def test_a_wrong_text_has_no_value_and_says_why() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", dtype=Colour)

    state = await program.run(backend=ScriptedBackend("blue"))
    with pytest.raises(sgl.OutputError, match="'blue' is not one of 'red'"):
        state.value("x")


async def test_the_constraint_reaches_the_request() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", regex="[0-9]+")
        s += sgl.gen("y")

    backend = ScriptedBackend("1")
    await program.run(backend=backend)
    assert [r.constraint for r in backend.requests] == [Constraint("regex", "[0-9]+"), None]


async def test_typed_answers_of_several_are_a_list() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", dtype=int, n=2)

    state = await program.run(backend=ScriptedBackend([["1", "2"]]))
    assert state.value("x") == [1, 2]
