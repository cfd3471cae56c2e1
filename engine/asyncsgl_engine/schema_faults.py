"""Where in a JSON schema a fault lies, found by trying its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["locate_fault"]

# Definitions first: a fault in one is better told there than where it is referred to.
_MAPS = ("$defs", "definitions", "properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else")
_MOST_TRIED = 200


def locate_fault(schema: Any, problem: Callable[[Any], str]) -> tuple[str, str]:
    """Find the innermost part of a schema that is at fault.

    A part is tried alone, with the definitions of the whole, so that its references hold.

    Args:
        schema: the whole, which has a fault.
        problem: says what is wrong with a schema; empty if nothing is.

    Returns:
        A JSON pointer to the part (`#` for the whole), and what is wrong with it.
    """
    shared = {}
    if isinstance(schema, dict):
        shared = {key: schema[key] for key in ("$defs", "definitions", "$schema") if key in schema}
    where, part, found = "#", schema, problem(schema)
    left = _MOST_TRIED
    while left > 0:
        for name, inner in _parts(part):
            left -= 1
            if left >= 0 and (fault := problem(shared | inner)):
                where, part, found = f"{where}/{name}", inner, fault
                break
        else:
            break
    return where, found


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Schemas directly inside a schema, with the pointers to them."""
    for key in _MAPS:
        if isinstance(named := schema.get(key), dict):
            for name, inner in named.items():
                if isinstance(inner, dict):
                    yield f"{key}/{_escaped(name)}", inner
    for key in _LISTS:
        if isinstance(listed := schema.get(key), list):
            for index, inner in enumerate(listed):
                if isinstance(inner, dict):
                    yield f"{key}/{index}", inner
    for key in _SINGLE:
        if isinstance(inner := schema.get(key), dict):
            yield key, inner


def _escaped(name: str) -> str:
    """A name as JSON pointers write it (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
