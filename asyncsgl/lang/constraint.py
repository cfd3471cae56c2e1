"""Types, regexes, schemas and grammars become one constraint and one decoder."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from ..errors import InvalidArgument, MissingDependency
from ..types import Constraint

__all__ = ["Constrained", "constrain"]

REGEX_INT = r"[-+]?[0-9]{1,18}"
REGEX_FLOAT = r"[-+]?[0-9]{1,18}(\.[0-9]{1,18})?([eE][-+]?[0-9]{1,3})?"
REGEX_BOOL = r"(True|False)"
REGEX_STRING = r'"([^"\\\x00-\x1f\x7f]|\\["\\/bfnrt])*"'

_DATA = frozenset({"const", "default", "enum", "examples"})  # keywords that hold no schemas
_OPEN = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
_SEPARATORS = (" ", "\n")
"""What may follow a number and ends it, as SGLang's frontend has it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Constrained:
    """What ``gen``'s type and grammar arguments amount to.

    Args:
        constraint: for the backend; None for free text.
        decode: makes the typed value of the text; None where the text is the value.
        stop: stop strings that the type brings along.
        choices: the texts to select from, where the type is a set of texts.
    """

    constraint: Constraint | None = None
    decode: Callable[[str], object] | None = None
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None


FREE = Constrained()


def constrain(
    *,
    dtype: object = None,
    regex: str | None = None,
    json_schema: object = None,
    ebnf: str | None = None,
) -> Constrained:
    """Make one constraint of at most one of the arguments.

    Args:
        dtype: ``int``, ``float``, ``bool``, ``str``, a ``Literal``, an ``Enum``, a dataclass
            or a pydantic model.
        regex: the whole text must match it.
        json_schema: a schema as dict or JSON text, or a class as for ``dtype``.
        ebnf: a grammar in Lark or GBNF notation.

    Raises:
        InvalidArgument: more than one is given, or one cannot be used.
    """
    if dtype is None and regex is None and json_schema is None and ebnf is None:
        return FREE
    given = {
        name: value
        for name, value in (
            ("dtype", dtype),
            ("regex", regex),
            ("json_schema", json_schema),
            ("ebnf", ebnf),
        )
        if value is not None
    }
    if len(given) > 1:
        raise InvalidArgument(" and ".join(given), "only one of these can be given")
    [(field, value)] = given.items()
    match field:
        case "dtype":
            return _of_type(value)
        case "regex":
            return Constrained(Constraint("regex", _checked_regex(value)))
        case "ebnf":
            return Constrained(Constraint("ebnf", _checked_grammar(value)))
        case _:
            return _of_schema(value)


def _checked_regex(pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise InvalidArgument("regex", f"must be a non-empty string, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidArgument(
            "regex", f"{pattern!r} is not a regular expression: {error}"
        ) from error
    return pattern


def _checked_grammar(grammar: object) -> str:
    if not isinstance(grammar, str) or not grammar.strip():
        raise InvalidArgument("ebnf", "must be a non-empty grammar")
    return grammar


def _of_type(kind: object) -> Constrained:
    match kind:
        case _ if kind is bool:
            return Constrained(Constraint("regex", REGEX_BOOL, "bool"), _decode_bool)
        case _ if kind is int:
            spaced = f"{REGEX_INT}[ \\n]?"
            return Constrained(Constraint("regex", spaced, "int"), _decode_int, _SEPARATORS)
        case _ if kind is float:
            spaced = f"{REGEX_FLOAT}[ \\n]?"
            return Constrained(Constraint("regex", spaced, "float"), _decode_float, _SEPARATORS)
        case _ if kind is str:
            return Constrained(Constraint("regex", REGEX_STRING, "str"), _decode_string)
        case _ if get_origin(kind) is Literal:
            return _of_values([(_as_text(value), value) for value in get_args(kind)])
        case type() if issubclass(kind, enum.Enum):
            return _of_values([(_as_text(member.value), member) for member in kind])
        case _:
            return _of_model("dtype", kind)


def _as_text(value: object) -> str:
    if isinstance(value, str):
        if not value:
            raise InvalidArgument("dtype", "a Literal or Enum cannot have an empty text")
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise InvalidArgument("dtype", f"a Literal or Enum of {type(value).__name__} has no text form")


def _of_values(pairs: Sequence[tuple[str, object]]) -> Constrained:
    values = dict(pairs)
    if not values:
        raise InvalidArgument("dtype", "an Enum needs at least one member")
    if len(values) < len(pairs):
        texts = ", ".join(text for text, _ in pairs)
        raise InvalidArgument("dtype", f"two values of a Literal or Enum look the same: {texts}")
    pattern = "(" + "|".join(_escape(text) for text in values) + ")"
    constraint = Constraint("regex", pattern, "one of " + ", ".join(values))
    return Constrained(constraint, _ValueOf(values), choices=tuple(values))


def _escape(text: str) -> str:
    """``text`` as a regular expression; escapes only what every regex dialect escapes."""
    return re.sub(r"([\\.^$*+?{}\[\]|()/-])", r"\\\1", text)


@dataclasses.dataclass(frozen=True, slots=True)
class _ValueOf:
    """Decodes a text by a table."""

    values: Mapping[str, object]

    def __call__(self, text: str) -> object:
        if text not in self.values:
            raise ValueError(f"{text!r} is not one of {', '.join(map(repr, self.values))}")
        return self.values[text]


def _decode_bool(text: str) -> bool:
    match text.strip().lower():
        case "true":
            return True
        case "false":
            return False
        case _:
            raise ValueError(f"{text!r} is neither True nor False")


def _decode_int(text: str) -> int:
    return int(text.strip())


def _decode_float(text: str) -> float:
    return float(text.strip())


def _decode_string(text: str) -> str:
    value = json.loads(text)
    if not isinstance(value, str):
        raise ValueError(f"{text!r} is not a quoted string")
    return value


def _of_schema(schema: object) -> Constrained:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise InvalidArgument("json_schema", f"is not JSON: {error}") from error
    if isinstance(schema, (Mapping, bool)):
        return Constrained(_schema_constraint(schema), json.loads)
    return _of_model("json_schema", schema)


def _schema_constraint(schema: object, label: str = "") -> Constraint:
    try:
        source = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidArgument("json_schema", f"cannot be written as JSON: {error}") from error
    return Constraint("json_schema", source, label)


@dataclasses.dataclass(frozen=True, slots=True)
class _DecodeModel:
    """Decodes JSON text into a model class, by pydantic."""

    model: Any

    def __call__(self, text: str) -> object:
        value: object = _adapter("dtype", self.model).validate_json(text)
        return value


def _of_model(field: str, model: object) -> Constrained:
    adapter = _adapter(field, model)
    try:
        schema = _closed(adapter.json_schema())
    except Exception as error:
        raise InvalidArgument(field, f"{model!r} has no JSON schema: {error}") from error
    label = getattr(model, "__name__", str(model))
    return Constrained(_schema_constraint(schema, label), _DecodeModel(model))


def _closed(schema: object) -> object:
    """A class's schema without properties that the class has not.

    Pydantic's schemas of classes that ignore further properties allow them, and a model may go
    on inventing some until its tokens are used up.
    """
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: part if name in _DATA else _closed(part) for name, part in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return made | {"additionalProperties": False} if named and not _OPEN & set(schema) else made


def _adapter(field: str, model: Any) -> Any:
    """Pydantic's adapter of a class; typed Any because pydantic is optional."""
    try:
        from pydantic import TypeAdapter
    except ImportError as error:
        raise MissingDependency("pydantic", "engine") from error
    try:
        return TypeAdapter(model)
    except Exception as error:
        raise InvalidArgument(
            field,
            f"cannot generate {model!r}: use int, float, bool, str, a Literal, an Enum, "
            "a dataclass or a pydantic model",
        ) from error
