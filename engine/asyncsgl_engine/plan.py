"""The contract between scheduler and runner: which tokens a pass computes, what it gave.

A runner may return from `launch` while its device is still computing; what is asked of it next
is then done after that, in the order in which it was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .request import Request, TokenLogprob

__all__ = ["DRAWN", "Mask", "Outcome", "PageCopy", "Pass", "Plan", "Row", "Runner", "Seat"]

DRAWN = -1
"""Stands for the token that was last drawn in the same slot, which only the runner knows yet."""


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first `tokens` tokens' keys and values of page `source` to `target`."""

    source: int
    target: int
    tokens: int


class Row(NamedTuple):
    """One sequence's share of a step; a tuple, as there is one for each sequence in each step.

    Args:
        slot: the sequence's seat in the runner's per-sequence tables, below
            `max_running_requests`.
        tokens: token ids to compute; `DRAWN` only as the one token of a row.
        start: position of the first of them; the positions before are in the pages.
        pages: ids of the pages that hold positions 0 to start + len(tokens) - 1.
        fresh_from: pages from this index on are new to the slot since its last row.
        score_from: index in `tokens` from which every position's logits are scored against
            the token that follows it; len(tokens) scores none.
        targets: the tokens that follow the scored positions.
        sample: whether a token is drawn after the last position.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    fresh_from: int
    score_from: int
    targets: Sequence[int]
    sample: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass: rows of a single token first, then the longer ones.

    Args:
        rows: at least one, at most one for a slot.
        copies: done before the forward pass, in order.
    """

    rows: tuple[Row, ...]
    copies: tuple[PageCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Seat:
    """A sequence taking a slot in the runner's tables.

    Args:
        slot: which.
        request: how to sample and what to report.
        tokens: prompt and output so far.
        seed: of its random draws.
        stop_ids: tokens that may not be drawn before `min_new_tokens`.
    """

    slot: int
    request: Request
    tokens: Sequence[int]
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mask:
    """Tokens that grammars allow.

    Args:
        rows: indices of the plan's rows that are restricted.
        bits: one line of 32-bit words for each, bit `t` of the line set where token t is
            allowed; (len(rows), ceil(vocab / 32)), int32.
    """

    rows: Sequence[int]
    bits: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a forward pass gave, by index of the plan's rows.

    Args:
        tokens: the drawn token of each row; -1 where none was drawn.
        logprobs: of drawn tokens, or those forced in their place, for the rows that asked.
        scores: of a row's targets.
        faulty: rows whose logits are not finite numbers.
    """

    tokens: Sequence[int]
    logprobs: Mapping[int, TokenLogprob] = field(default_factory=dict)
    scores: Mapping[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    faulty: frozenset[int] = frozenset()


class Pass(Protocol):
    """A forward pass that was launched."""

    def draw(self, mask: Mask | None, forced: Mapping[int, int]) -> None:
        """Draw tokens from its logits; called once, before the next launch.

        Args:
            mask: what grammars allow, for the rows that have one.
            forced: rows whose token was forced since the launch, and the token. What is drawn
                for them is of no use; what is told of them is told of the forced one.
        """
        ...

    def outcome(self) -> Outcome:
        """Wait for what it gave; called once, after `draw`, possibly after later launches."""
        ...


class Runner(Protocol):
    """What computes plans."""

    def seat(self, seat: Seat) -> None:
        """Take over a sequence that got a slot."""
        ...

    def launch(self, plan: Plan) -> Pass:
        """Begin a forward pass; its sequences are seated."""
        ...
