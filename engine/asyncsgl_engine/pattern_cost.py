"""How much a regular expression takes to compile, told from its text."""

from __future__ import annotations

import re
import sys

__all__ = ["pattern_cost"]

_ITEM = re.compile(
    r"""
    (?P<escape>\\[xuUNpP]\{[^}]*\}|\\.)
  | (?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])
  | (?P<comment>\(\?\#[^)]*\))
  | (?P<verbose>\(\?[A-Za-z0-9]*x[A-Za-z0-9-]*[:)])
  | (?P<open>\()
  | (?P<close>\))
  | (?P<count>\{(?P<least>\d*)(?P<comma>,)?(?P<most>\d*)\})
  | (?P<plus>\+)
  | (?P<free>[*?])
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


def pattern_cost(source: str) -> int:
    """The parts a pattern has once its counted repetitions are written out.

    The compiler of `regex` writes them out: `(?:a{99}){99}` has 9,801 parts, and `x+` is `xx*`.
    What is no valid pattern has a cost, too. One with the flag `x`, whose comments would hide
    what is repeated, counts as the dearest.

    Args:
        source: a pattern.
    """
    groups = [0]  # of each group that is open, its cost so far
    last = 0  # of what a repetition would repeat
    for found in _ITEM.finditer(source):
        match found.lastgroup:
            case "verbose":
                return sys.maxsize
            case "open":
                groups.append(0)
                last = 0
            case "close" if len(groups) > 1:
                last = groups.pop() + 1
                groups[-1] += last
            case "count" | "plus":
                more = last * (_times(found) - 1)
                groups[-1] += more
                last += more
            case "free" | "comment":
                pass
            case _:
                last = 1
                groups[-1] += 1
    return sum(groups)


def _times(found: re.Match[str]) -> int:
    if found.lastgroup == "plus":
        return 2
    numbers = [int(text) for text in (found["least"], found["most"]) if text]
    return max(numbers, default=0) + 1
