"""JSON schemas as providers enforce them: a subset, and always an object at the root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["ANTHROPIC", "GEMINI", "OPENAI", "Dialect", "Narrowed", "narrowed", "wrapped"]

KEY = "value"
"""The one property of an object that stands in for a value that is none."""

_ANNOTATIONS = frozenset({"title", "default", "examples", "$schema", "$id", "$comment"})
_STRUCTURE = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf"}
)
_REFERENCES = frozenset({"$ref", "$defs", "definitions"})
_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_LENGTHS = frozenset({"minItems", "maxItems"})


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one provider enforces.

    Args:
        keywords: the keywords that count there.
        closed: every object must list all its properties and allow no others.
    """

    keywords: frozenset[str]
    closed: bool


OPENAI = Dialect(
    _STRUCTURE | _REFERENCES | _NUMBERS | _LENGTHS | {"description", "pattern", "format"}, True
)
ANTHROPIC = Dialect(_STRUCTURE | _REFERENCES | {"description", "format"}, True)
GEMINI = Dialect(_STRUCTURE | _REFERENCES | _LENGTHS | {"description", "minimum", "maximum"}, False)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A schema that a provider can enforce.

    Args:
        schema: an object's schema.
        exact: all that fits it fits the original; else the answer must be checked, too.
        in_object: the answer is the property ``value`` of the object.
    """

    schema: dict[str, object]
    exact: bool
    in_object: bool


def wrapped(schema: Mapping[str, object]) -> dict[str, object]:
    """An object with ``schema`` as its one property."""
    inner = {name: value for name, value in schema.items() if name not in ("$defs", "definitions")}
    outer: dict[str, object] = {
        "type": "object",
        "properties": {KEY: inner},
        "required": [KEY],
        "additionalProperties": False,
    }
    return outer | {name: schema[name] for name in ("$defs", "definitions") if name in schema}


def narrowed(schema: object, dialect: Dialect) -> Narrowed | None:
    """``schema`` as ``dialect`` can enforce it, or as much of it; None where it cannot at all.

    Objects are closed and all their properties required where the dialect wants it: what
    fits the closed schema fits the open one. Keywords that the dialect lacks are left out.
    """
    if not isinstance(schema, Mapping):
        return None
    narrow = _Narrowing(dialect)
    in_object = schema.get("type") != "object" or "anyOf" in schema or "$ref" in schema
    made = narrow.schema(wrapped(schema) if in_object else schema)
    if made is None:
        return None
    return Narrowed(made, narrow.exact, in_object)


class _Narrowing:
    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.exact = True

    def schema(self, schema: Mapping[str, object]) -> dict[str, object] | None:
        """The narrower schema; None if a part cannot be said at all."""
        made: dict[str, object] = {}
        for name, value in schema.items():
            if name in _ANNOTATIONS:
                continue
            if name not in self._dialect.keywords:
                self.exact = False
                continue
            part = self._part(name, value)
            if part is None:
                return None
            made[name] = part
        if not made:
            return None if self._dialect.closed else {}
        if self._dialect.closed and (made.get("type") == "object" or "properties" in made):
            return self._closed(made)
        return made

    def _part(self, name: str, value: object) -> object:
        match name, value:
            case "properties" | "$defs" | "definitions", Mapping():
                parts = {key: self._sub(part) for key, part in value.items()}
                return None if None in parts.values() else parts
            case "items", Mapping():
                return self._sub(value)
            case "items", _:
                return None
            case "anyOf", Sequence():
                options = [self._sub(part) for part in value]
                return None if None in options else options
            case "additionalProperties", Mapping():
                return None if self._dialect.closed else self._sub(value)
            case _:
                return value

    def _sub(self, value: object) -> dict[str, object] | None:
        return self.schema(value) if isinstance(value, Mapping) else None

    def _closed(self, made: dict[str, object]) -> dict[str, object] | None:
        properties = made.get("properties")
        if not isinstance(properties, dict):
            return None
        return made | {"required": list(properties), "additionalProperties": False}
