"""Counts what has become of the rows of a batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..types import Usage

__all__ = ["Tally"]

_MOST_ERRORS = 1000


@dataclass(slots=True)
class Tally:
    """Running counts of one batch.

    Args:
        total: rows of the input, if they could be counted.
        skipped: rows that were answered before.
        answered: rows that were answered now.
        failed: rows that failed now.
        usage: tokens of both.
        errors: each distinct error with how often it came and the line of the first, in the
            order they came. Beyond the first thousand, new ones are only counted as failed.
    """

    total: int | None = None
    skipped: int = 0
    answered: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    errors: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    _began: float = field(default_factory=time.monotonic)
    _ended: float | None = None

    @property
    def done(self) -> int:
        """Rows that need no more work."""
        return self.skipped + self.answered + self.failed

    @property
    def seconds(self) -> float:
        """Since the first row could begin; without the time that a model took to load."""
        return max(1e-9, (self._ended or time.monotonic()) - self._began)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, over the whole time."""
        return self.usage.completion_tokens / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the rows so far; ``None`` before there is one."""
        worked = self.answered + self.failed
        if self.total is None or not worked:
            return None
        return max(0, self.total - self.done) * self.seconds / worked

    def begin(self) -> None:
        """The rows begin now."""
        self._began = time.monotonic()

    def end(self) -> None:
        """The rows have ended; the clock stops."""
        self._ended = time.monotonic()

    def skip(self) -> None:
        """One row was answered before."""
        self.skipped += 1

    def add(self, usage: Usage, error: str | None = None, line: int = 0) -> None:
        """One row was answered, or failed with ``error``; ``line`` is its line in the input."""
        self.usage += usage
        if error is None:
            self.answered += 1
            return
        self.failed += 1
        count, first = self.errors.get(error, (0, line))
        if count or len(self.errors) < _MOST_ERRORS:
            self.errors[error] = (count + 1, first)
