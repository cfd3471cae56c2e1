"""Stop strings and patterns that the provider does not take, enforced on the text."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["StopCutter"]


class StopCutter:
    """Passes growing text on up to the first stop; holds back what may begin one.

    With patterns it passes nothing on before the end, as any text may begin a match.

    Args:
        strings: stop strings.
        patterns: regular expressions; the text ends where the first match begins.

    Attributes:
        matched: the stop that was found, as it was given.
    """

    def __init__(self, strings: Sequence[str], patterns: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        self._patterns = [re.compile(pattern) for pattern in patterns]
        self._longest = max(map(len, strings), default=0)
        self._held = ""
        self.matched: str | None = None

    def stopped(self) -> bool:
        """Whether a stop was found."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Take new text and give what may be shown; nothing after a stop."""
        if self.matched is not None:
            return ""
        self._held += text
        at = self._find()
        if at is None:
            at = 0 if self._patterns else self._safe()
            shown, self._held = self._held[:at], self._held[at:]
            return shown
        shown, self._held = self._held[:at], ""
        return shown

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        shown, self._held = self._held, ""
        return shown

    def _find(self) -> int | None:
        best: int | None = None
        for stop in self._strings:
            at = self._held.find(stop)
            if at >= 0 and (best is None or at < best):
                best, self.matched = at, stop
        for pattern in self._patterns:
            found = pattern.search(self._held)
            if found is not None and (best is None or found.start() < best):
                best, self.matched = found.start(), pattern.pattern
        return best

    def _safe(self) -> int:
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._strings):
                return len(self._held) - size
        return len(self._held)
