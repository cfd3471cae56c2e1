"""Reads a value of a given form off the head of a text that a model wrote freely."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..backends.forms import form_of
from ..types import Constraint

__all__ = ["choice_at", "value_at"]


def value_at(
    text: str, constraint: Constraint, stops: Sequence[str], after: str
) -> tuple[str, int]:
    """The value that ``text`` begins with, white space before it left out, and where it ends.

    Args:
        text: what the model wrote from here on.
        constraint: a regular expression or a JSON schema.
        stops: strings that end the value.
        after: what the program has after the value, if that is known.

    Raises:
        ValueError: it begins with none; says why, for the model to read.
    """
    begin = len(text) - len(text.lstrip())
    if constraint.kind != "regex":
        value = _json(text, begin, constraint)
        return value, begin + len(value)
    begin, value = _matching(text, begin, constraint, after)
    for stop in stops:
        value = value.partition(stop)[0]
    return value, begin + len(value)


def _matching(text: str, begin: int, constraint: Constraint, after: str) -> tuple[int, str]:
    """Where the first match begins, and the match; one that ends where it should if there is."""
    end = re.escape(after) if after else r"\s*\Z"
    for tail in (f"(?={end})", ""):
        pattern = re.compile(f"(?:{constraint.source}){tail}")
        for start in dict.fromkeys((0, begin)):
            found = pattern.match(text, start)
            if found is not None and found[0].strip():
                return start, found[0]
    wanted = constraint.label or f"text that matches {constraint.source}"
    raise ValueError(f"{_short(text)} stands where {wanted} is wanted")


def _json(text: str, begin: int, constraint: Constraint) -> str:
    try:
        _, end = json.JSONDecoder().raw_decode(text, begin)
    except ValueError as error:
        raise ValueError(f"{_short(text)} stands where JSON is wanted: {error}") from error
    form = form_of(constraint, None, structured=False, open_turn=True)
    return form.read(text[begin:end])


def choice_at(text: str, choices: Sequence[str]) -> tuple[int, int]:
    """The index of the longest choice that ``text`` begins with, and where it ends.

    Raises:
        ValueError: it begins with none of them; says so, for the model to read.
    """
    for start in dict.fromkeys((0, len(text) - len(text.lstrip()))):
        found = [choice for choice in choices if text.startswith(choice, start)]
        if found:
            longest = max(found, key=len)
            return list(choices).index(longest), start + len(longest)
    raise ValueError(f"{_short(text)} stands where one of these is wanted: {', '.join(choices)}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
