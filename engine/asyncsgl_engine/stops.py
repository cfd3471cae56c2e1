"""Stop strings and patterns, found in text that grows piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from .errors import InvalidRequest

__all__ = ["StopMatcher", "compile_patterns"]


def compile_patterns(sources: Sequence[str]) -> tuple[regex.Pattern[str], ...]:
    """Compile `stop_regex`.

    Raises:
        InvalidRequest: one of them is not a regular expression.
    """
    compiled = []
    for source in sources:
        try:
            compiled.append(regex.compile(source))
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
            found = pattern.search(whole, past)
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
            partial = pattern.search(whole, len(self._past), partial=True)
            if partial is not None:
                safe = min(safe, partial.start() - len(self._past))
        return safe
