"""What one call wrote for a whole turn, and how far the program has read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ..backends.cutting import StopCutter
from ..types import Delta, FinishReason, Generation, GenRequest, SamplingParams, Usage
from .branch import Branch

__all__ = ["Draft", "Reading"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One variable's share of a draft.

    Args:
        text: the value.
        end: where in the draft the value ends.
        finish: why it ended.
        matched: the stop that ended it.
    """

    text: str
    end: int
    finish: FinishReason = "stop"
    matched: str | None = None


class Draft:
    """The text of one call, complete or still growing, that a turn's generations are read from.

    Args:
        request: the call.
        sampling: how it samples, without what only ends a text.
        turn: which of the branch's turns it is for.
        tries: how many calls for this turn there were, this one included.

    Attributes:
        text: what has come so far.
        reasoning: what of the model's reasoning has come and was not shown yet.
        ended: nothing more will come.
        error: why the call failed.
        generation: its result, once it is there.
        task: what makes it grow, where it comes piece by piece.
    """

    __slots__ = (
        "_at",
        "_news",
        "_parts",
        "_reported",
        "_stop",
        "ended",
        "error",
        "generation",
        "reasoning",
        "request",
        "sampling",
        "task",
        "text",
        "tries",
        "turn",
    )

    def __init__(
        self, request: GenRequest, sampling: SamplingParams, turn: int, tries: int
    ) -> None:
        self.request = request
        self.sampling = sampling
        self.turn = turn
        self.tries = tries
        self.text = ""
        self.reasoning = ""
        self.ended = False
        self.error: Exception | None = None
        self.generation: Generation | None = None
        self.task: asyncio.Task[None] | None = None
        self._parts = 0
        self._at = 0
        self._stop = ""
        self._reported = False
        self._news: asyncio.Future[None] | None = None

    # -- growing --------------------------------------------------------------------------

    def add(self, delta: Delta) -> None:
        """Take the next piece."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.generation = delta.generation or self.generation
        self._tell()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will come."""
        self.ended = True
        self.error = error
        self._tell()

    def close(self) -> None:
        """Nobody reads on: give up what has not come yet."""
        if self.task is not None and not self.ended:
            self.task.cancel()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _more(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    async def whole(self) -> str:
        """The text from where the turn has come to, to its end.

        Raises:
            Exception: the call failed.
        """
        while not self.ended:
            await self._more()
        if self.error is not None:
            raise self.error
        return self.text[self._at :]

    # -- reading --------------------------------------------------------------------------

    async def follows(self, branch: Branch) -> bool:
        """Read on over what the turn has got since; False if the text is another.

        The text may have white space before a part of the turn, and the stop string that
        ended the last value may be missing in the turn.

        Raises:
            Exception: the call failed.
        """
        new = branch.parts[self._parts :]
        at = self._at if new else self._at + len(self._stop)
        for part in new:
            found = await self._after(part, at) if isinstance(part, str) else None
            if found is None and self.error is not None:
                raise self.error
            if found is None:
                return False
            at, self._stop = found, ""
        self._parts, self._at, self._stop = len(branch.parts), at, ""
        return True

    async def _after(self, part: str, at: int) -> int | None:
        """Where the text goes on after ``part``, which is to stand at ``at``; None if it is not."""
        for start in (at, at + len(self._stop)):
            if await self._has(part, start):
                return start + len(part)
        while not self.text[at:].strip() and not self.ended:
            await self._more()
        start = len(self.text) - len(self.text[at:].lstrip())
        return start + len(part) if await self._has(part, start) else None

    async def _has(self, part: str, start: int) -> bool:
        while len(self.text) < start + len(part) and not self.ended:
            await self._more()
        return self.text.startswith(part, start)

    async def read(
        self,
        stops: tuple[str, ...],
        patterns: tuple[str, ...],
        until: str,
        show: Callable[[str], None],
    ) -> Reading:
        """The value that begins here: up to a stop, to ``until``, or to the end.

        Args:
            stops: strings that end it.
            patterns: regular expressions that end it.
            until: the program's text after it, which ends it where it has no stops.
            show: takes the pieces as they come.

        Raises:
            Exception: the call failed before the value was complete.
        """
        ends = stops if stops or patterns or not until else (until,)
        cutter = StopCutter(ends, patterns)
        at, text = self._at, ""
        while True:
            piece = self.text[at:]
            at += len(piece)
            shown = cutter.push(piece)
            if self.ended and not cutter.stopped() and self.error is None:
                shown += cutter.flush()
            text += shown
            show(shown)
            if cutter.stopped():
                matched = cutter.matched if ends == stops else None
                return Reading(text, self._at + len(text), "stop", matched)
            if self.error is not None:
                raise self.error
            if self.ended:
                finish = self.generation.completions[0].finish_reason if self.generation else "stop"
                return Reading(text, self._at + len(text), finish)
            await self._more()

    @property
    def exhausted(self) -> bool:
        """Whether everything has been read and nothing more will come."""
        return self.ended and self._at >= len(self.text)

    def took(self, branch: Branch, reading: Reading) -> None:
        """The branch has put down what was read."""
        self._parts = len(branch.parts)
        self._at = reading.end
        stop = reading.matched or ""
        self._stop = stop if self.text.startswith(stop, reading.end) else ""

    @property
    def start(self) -> int:
        """Where in the text the next value begins."""
        return self._at

    def usage(self) -> Usage:
        """What the call cost, once: to whoever asks first when it is known."""
        if self._reported or self.generation is None:
            return Usage()
        self._reported = True
        return self.generation.usage
