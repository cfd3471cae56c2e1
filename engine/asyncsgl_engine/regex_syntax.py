r"""Python regular expressions → the syntax of the regex engine that masks are made with.

The two syntaxes look alike and differ in small ways (`{"a": 1}`, `[[]`, `[a&&b]`, `x{,3}`, `\Z`,
what `\w` and `\s` take in), so a pattern is parsed by Python and written anew from its parse tree:
what a mask lets through is then what `re.fullmatch` matches.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from importlib import import_module
from typing import Any

__all__ = ["UnsupportedRegex", "translate_regex"]

# The standard library's own parser; it has had this place and these trees since Python 3.11.
_parser: Any = import_module("re._parser")

_SIGNS = {
    "ASSERT": ("look-ahead and look-behind", ("(?=", "(?<=")),
    "ASSERT_NOT": ("negative look-ahead and look-behind", ("(?!", "(?<!")),
    "ATOMIC_GROUP": ("atomic groups", ("(?>",)),
    "POSSESSIVE_REPEAT": ("possessive repeats", ("*+", "++", "?+", "}+")),
    "GROUPREF": ("back references", ("\\1", "(?P=")),
    "GROUPREF_IGNORE": ("back references", ("\\1", "(?P=")),
    "GROUPREF_EXISTS": ("conditional groups", ("(?(",)),
    "AT_BOUNDARY": ("word boundaries", ("\\b",)),
    "AT_NON_BOUNDARY": ("word boundaries", ("\\B",)),
}

# Contents of classes. A class that allows characters takes in no more than Python's, one that
# forbids them no less: letters count that Python's version of Unicode has, and \d writes 0 to 9.
_AGE = tuple(int(part) for part in unicodedata.unidata_version.split(".")[:2])
_LETTERS = r"[\p{L}\p{N}_]"
_ALLOWING = {
    "DIGIT": "0-9",
    "WORD": f"[{_LETTERS}&&\\p{{age:{_AGE[0]}.{_AGE[1]}}}]" if _AGE <= (16, 0) else _LETTERS,
    "SPACE": r"\s\x1c-\x1f",
}
_FORBIDDING = {"DIGIT": r"\p{Nd}", "WORD": _LETTERS, "SPACE": r"\s\x1c-\x1f"}
_ASCII = {"DIGIT": "0-9", "WORD": "0-9A-Za-z_", "SPACE": r" \t\n\r\x0b\x0c"}


class UnsupportedRegex(ValueError):
    """Raised for a pattern that is no regular expression, or no regular language.

    Args:
        problem: what is wrong.
        position: index in the pattern where it is, None when that is unknown.
    """

    def __init__(self, problem: str, position: int | None) -> None:
        super().__init__(problem if position is None else f"{problem} at position {position}")
        self.position = position


def translate_regex(pattern: str) -> str:
    r"""Write a Python pattern in the Rust `regex` crate's syntax.

    Args:
        pattern: as for `re.compile`.

    Returns:
        A pattern whose full matches are those of `re.fullmatch`, but that `\d` is 0 to 9.

    Raises:
        UnsupportedRegex: it is malformed, or needs more than a regular language
            (look-arounds, back references, atomic groups, word boundaries, inner anchors).
    """
    try:
        tree = _parser.parse(pattern)
    except re.error as error:
        raise UnsupportedRegex(error.msg, error.pos) from error
    except (RecursionError, OverflowError) as error:
        raise UnsupportedRegex(f"too deep or too large ({error})", None) from error
    return _Writer(pattern).sequence(tree, tree.state.flags)


class _Writer:
    """Writes parse trees of one pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def sequence(self, items: Iterable[tuple[Any, Any]], flags: int) -> str:
        return "".join(self._item(str(op), value, flags) for op, value in items)

    def _item(self, op: str, value: Any, flags: int) -> str:
        match op:
            case "LITERAL":
                return _folded(_char(value), flags)
            case "NOT_LITERAL":
                return _folded(f"[^{_char(value)}]", flags)
            case "ANY":
                return "(?s:.)" if flags & re.DOTALL else r"[^\n]"
            case "IN":
                return _folded(_class(value, flags), flags)
            case "BRANCH":
                return f"(?:{'|'.join(self.sequence(branch, flags) for branch in value[1])})"
            case "SUBPATTERN":
                _, added, removed, inner = value
                return f"(?:{self.sequence(inner, (flags | added) & ~removed)})"
            case "MAX_REPEAT" | "MIN_REPEAT":
                return self._repeat(value, flags)
            case "AT":
                return self._anchor(str(value), flags)
        raise self._unsupported(op)

    def _repeat(self, value: tuple[int, Any, Iterable[tuple[Any, Any]]], flags: int) -> str:
        least, most, inner = value
        upper = "" if most is _parser.MAXREPEAT else str(int(most))
        return f"(?:{self.sequence(inner, flags)}){{{least},{upper}}}"

    def _anchor(self, where: str, flags: int) -> str:
        line_wise = flags & re.MULTILINE
        if where == "AT_BEGINNING_STRING" or (where == "AT_BEGINNING" and not line_wise):
            return "^"
        if where == "AT_END_STRING" or (where == "AT_END" and not line_wise):
            return "$"
        if where in _SIGNS:
            raise self._unsupported(where)
        raise UnsupportedRegex("anchors of lines (the flag m) are not supported", None)

    def _unsupported(self, op: str) -> UnsupportedRegex:
        name, signs = _SIGNS.get(op, (op, ()))
        places = [place for sign in signs if (place := self._pattern.find(sign)) >= 0]
        return UnsupportedRegex(f"{name} are not supported", min(places, default=None))


def _char(code: int) -> str:
    char = chr(code)
    return char if char.isalnum() else f"\\x{{{code:x}}}"


def _folded(text: str, flags: int) -> str:
    return f"(?i:{text})" if flags & re.IGNORECASE else text


def _class(items: list[tuple[Any, Any]], flags: int) -> str:
    negated = str(items[0][0]) == "NEGATE"
    parts = []
    for op, value in items[1:] if negated else items:
        match str(op):
            case "LITERAL":
                parts.append(_char(value))
            case "RANGE":
                parts.append(f"{_char(value[0])}-{_char(value[1])}")
            case "CATEGORY":
                parts.append(_category(str(value), flags, forbids=negated))
            case other:
                raise UnsupportedRegex(f"{other} in a character class is not supported", None)
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _category(name: str, flags: int, *, forbids: bool) -> str:
    kind = name.removeprefix("CATEGORY_")
    negated = kind.startswith("NOT_")
    contents = _FORBIDDING if forbids != negated else _ALLOWING
    if flags & re.ASCII:
        contents = _ASCII
    return f"[{'^' if negated else ''}{contents[kind.removeprefix('NOT_')]}]"
