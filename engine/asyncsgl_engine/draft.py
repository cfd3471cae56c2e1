"""A step on its way from the first row to a plan."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import PageCopy, Plan, Row
from .sequence import Sequence

__all__ = ["Draft", "Scheduled"]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A step as decided.

    Args:
        plan: for the runner.
        sequences: whose rows they are, in the order of the plan's rows.
        seated: sequences that got a slot just now; the runner must be told of them first.
    """

    plan: Plan
    sequences: tuple[Sequence, ...]
    seated: tuple[Sequence, ...]


class Draft:
    """A plan in the making."""

    __slots__ = ("budget", "computing", "copies", "many", "scheduled", "seated", "single")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.single: list[tuple[Row, Sequence]] = []
        self.many: list[tuple[Row, Sequence]] = []
        self.copies: list[PageCopy] = []
        self.seated: list[Sequence] = []
        self.scheduled: set[int] = set()
        self.computing: set[int] = set()

    def finished(self) -> Scheduled:
        """The plan: rows of a single token first."""
        rows = self.single + self.many
        plan = Plan(tuple(row for row, _ in rows), tuple(self.copies))
        return Scheduled(plan, tuple(sequence for _, sequence in rows), tuple(self.seated))
