"""A step between its launch and its landing."""

from __future__ import annotations

from dataclasses import dataclass, field

from .answer import Answer
from .constraints import Masking
from .draft import Scheduled
from .plan import Outcome, Pass

__all__ = ["Flight"]


@dataclass(slots=True, eq=False)
class Flight:
    """A planned step and what became of it.

    Args:
        scheduled: what it computes.
        answers: whose rows they are; some may have ended since.
        launched: the runner's, once it is launched.
        masking: what grammars allow in it.
        error: why it could not be launched.
        lost: whether it was undone, so that what it gives means nothing.
    """

    scheduled: Scheduled
    answers: tuple[Answer, ...]
    launched: Pass | None = None
    masking: Masking = field(default_factory=lambda: Masking(None))
    error: Exception | None = None
    lost: bool = False

    def end(self, index: int) -> int:
        """The position after the last token of a row."""
        row = self.scheduled.plan.rows[index]
        return row.start + len(row.tokens)

    def draws(self, index: int) -> bool:
        """Whether a row draws the token that its sequence needs next."""
        tokens = self.answers[index].sequence.tokens
        return self.scheduled.plan.rows[index].sample and self.end(index) == len(tokens)

    def draw(self) -> None:
        """Wait for the masks, and let tokens be drawn."""
        assert self.launched is not None
        rows = self.scheduled.plan.rows
        forced = {
            index: self.answers[index].sequence.tokens[self.end(index)]
            for index, row in enumerate(rows)
            if row.sample and not self.draws(index)
        }
        self.launched.draw(self.masking.result(), forced)

    def outcome(self) -> Outcome:
        """Wait for what it gave.

        Raises:
            Exception: the pass failed, now or at its launch.
        """
        if self.error is not None:
            raise self.error
        assert self.launched is not None
        return self.launched.outcome()
