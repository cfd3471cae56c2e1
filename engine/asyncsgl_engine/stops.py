"""Stop strings and patterns, found in text that grows piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from .errors import InvalidRequest
from .pattern_cost import pattern_cost

__all__ = ["StopMatcher", "compile_patterns"]

_PARTS = 4000
"""Of all patterns of a request, written out: half a megabyte."""
_SEARCH_S = 0.05
"""A search takes microseconds, unless a pattern backtracks without end."""


def compile_patterns(sources: Sequence[str]) -> tuple[regex.Pattern[str], ...]:
    """Compile `stop_regex`.

    Raises:
        InvalidRequest: one of them is not a regular expression, or they take too much.
    """
    compiled = []
    if sum(map(pattern_cost, sources)) > _PARTS:
        raise InvalidRequest(
            "stop_regex",
            f"has more than {_PARTS} parts once its repetitions are written out; repeat less "
            "inside of what is repeated, and leave out the flag x",
        )
    for source in sources:
        try:
            compiled.append(regex.compile(source, cache_pattern=False))
        except regex.error as error:
            raise InvalidRequest("stop_regex", f"{source!r} does not compile: {error}") from error
    return tuple(compiled)


class StopMatcher:
    """Passes text on, up to the first stop; holds back what might be the start of one.

    A pattern stops the text as soon as what is there matches, at the first match.

    Args:
        strings: stop strings.
        patterns: compiled stop patterns.
        keep: show the stop itself too.
    """

    __slots__ = ("_held", "_keep", "_longest", "_past", "_patterns", "_strings", "matched")

    def __init__(
        self, strings: Sequence[str], patterns: Sequence[regex.Pattern[str]], keep: bool = False
    ) -> None:
        self._keep = keep
        self._strings = tuple(strings)
        self._patterns = tuple(patterns)
        self._longest = max((len(text) for text in strings), default=0)
        self._past = ""
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """Take new text and give back what may be shown.

        Args:
            text: what was added.
            armed: whether a stop counts yet; text shown unarmed is never taken back.

        Returns:
            New text before any stop. `matched` is set once a stop was found; text pushed
            after that is dropped.

        Raises:
            InvalidRequest: a pattern takes too long to search for; nothing was given back.
        """
        if self.matched is not None:
            return ""
        self._held += text
        if not armed:
            return self._release(len(self._held))
        found = self._find()
        if found is not None:
            shown, self._held = self._held[: found[self._keep]], ""
            return shown
        return self._release(self._safe())

    def flush(self) -> str:
        """The text that was held back, when no more will come."""
        shown, self._held = self._held, ""
        return shown

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        if self._patterns:
            self._past += shown
        return shown

    def _find(self) -> tuple[int, int] | None:
        """Where the first stop in the held text begins and ends; `matched` becomes that stop."""
        best: tuple[int, int] | None = None
        for stop in self._strings:
            at = self._held.find(stop)
            if at >= 0 and (best is None or at < best[0]):
                best, self.matched = (at, at + len(stop)), stop
        past = len(self._past)
        whole = self._past + self._held
        for pattern in self._patterns:
            found = _search(pattern, whole, past)
            if found is not None and (best is None or found.start() - past < best[0]):
                best, self.matched = (found.start() - past, found.end() - past), pattern.pattern
        return best

    def _safe(self) -> int:
        """How much of the held text can no longer become part of a stop."""
        held = self._held
        safe = len(held)
        for size in range(min(self._longest - 1, len(held)), 0, -1):
            tail = held[-size:]
            if any(stop.startswith(tail) for stop in self._strings):
                safe = len(held) - size
                break
        whole = self._past + held
        for pattern in self._patterns:
            partial = _search(pattern, whole, len(self._past), partial=True)
            if partial is not None:
                safe = min(safe, partial.start() - len(self._past))
        return safe


def _search(
    pattern: regex.Pattern[str], text: str, start: int, *, partial: bool = False
) -> regex.Match[str] | None:
    try:
        return pattern.search(text, start, partial=partial, timeout=_SEARCH_S)
    except TimeoutError as error:
        problem = f"{pattern.pattern!r} takes too long to search for; make it simpler"
        raise InvalidRequest("stop_regex", problem) from error
