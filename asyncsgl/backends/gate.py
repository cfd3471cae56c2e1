"""The way of a backend's calls to its service: limits, budget, retries."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Protocol, TypeVar

from ..errors import BackendError, BackendTimeout, OverloadedError
from ..types import Usage
from .budget import Budget, Hold
from .calls import Call, Piece
from .estimates import Estimates
from .limits import Limiter, Ticket
from .retry import Clock, RetryPolicy, retried, retried_stream

__all__ = ["Gate"]


_UNSEEN = (asyncio.CancelledError, GeneratorExit, BackendTimeout)
"""What ends a call whose answer may be on its way."""


class _Answer(Protocol):
    @property
    def usage(self) -> Usage: ...


A = TypeVar("A", bound=_Answer)


class Gate:
    """Lets the calls of one backend through, tries them again, and counts what they cost.

    Args:
        limiter: shared by all backends with the same place, key and model.
        budget: this backend's own.
        policy: when to try again; may be replaced at any time.
        clock: time and chance.

    Attributes:
        retries: tries after the first ones.
    """

    def __init__(self, limiter: Limiter, budget: Budget, policy: RetryPolicy, clock: Clock) -> None:
        self.limiter = limiter
        self.budget = budget
        self.policy = policy
        self.retries = 0
        self._clock = clock
        self._estimates = Estimates()

    async def answer(self, call: Call, ask: Callable[[], Awaitable[A]]) -> A:
        """What ``ask`` gives for ``call``, asked again after failures that may pass.

        Raises:
            BudgetExceeded: the call could cost too much; it was not sent.
            BackendError: that of the last try.
        """
        passage = self._passage(call)

        async def once() -> A:
            async with passage as ticket:
                found = await ask()
                ticket.settle(found.usage)
                return found

        return await retried(
            once,
            self.policy,
            cooldown=self.limiter.cooldown,
            clock=self._clock,
            on_retry=self._count_retry,
            queued=passage.queued,
        )

    def pieces(
        self, call: Call, pieces: Callable[[], AsyncGenerator[Piece, None]]
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of ``call``, tried again while none has come. Raises as :meth:`answer`."""
        passage = self._passage(call)

        async def once() -> AsyncGenerator[Piece, None]:
            async with passage as ticket, aclosing(pieces()) as opened:
                async for piece in opened:
                    passage.written += len(piece.text) + len(piece.reasoning)
                    if piece.usage is not None:
                        ticket.settle(piece.usage)
                    yield piece

        return retried_stream(
            once,
            self.policy,
            cooldown=self.limiter.cooldown,
            clock=self._clock,
            on_retry=self._count_retry,
            queued=passage.queued,
        )

    def _passage(self, call: Call) -> _Passage:
        patience = math.inf if self.policy.deadline is None else self.policy.deadline
        return _Passage(self.limiter, self.budget, self._estimates, self._clock, call, patience)

    def _count_retry(self, number: int, error: BackendError, delay: float) -> None:  # noqa: ARG002
        self.retries += 1


class _Passage:
    """The tries of one call, each a time inside the limits with money set aside for it.

    Args:
        written: characters of the answer that came by now.
    """

    __slots__ = (
        "_budget", "_call", "_clock", "_estimates", "_hold", "_limiter", "_patience", "_ticket",
        "_waited", "written",
    )  # fmt: skip

    def __init__(
        self,
        limiter: Limiter,
        budget: Budget,
        estimates: Estimates,
        clock: Clock,
        call: Call,
        patience: float,
    ) -> None:
        self._limiter = limiter
        self._budget = budget
        self._estimates = estimates
        self._call = call
        self._clock = clock
        self._patience = patience
        self._waited = 0.0
        self._hold: Hold | None = None
        self._ticket: Ticket | None = None
        self.written = 0

    def queued(self) -> float:
        """Seconds that the tries waited for their turn, for which the service is not to blame."""
        return self._waited

    async def __aenter__(self) -> Ticket:
        self.written = 0
        await self._budget.ready()
        most = self._estimates.most(self._call)
        hold = self._budget.hold(most)
        began = self._clock.now()
        try:
            likely = self._estimates.likely(self._call, most)
            ticket = await self._limiter.enter(likely, patience=self._patience)
        except BaseException:
            self._budget.settle(hold, None)
            raise
        finally:
            self._waited += self._clock.now() - began
        self._hold, self._ticket = hold, ticket
        return ticket

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        ticket, hold = self._ticket, self._hold
        assert ticket is not None
        assert hold is not None
        if isinstance(exc, OverloadedError):
            ticket.refuse()
        if ticket.usage is not None:
            self._estimates.correct(self._call, ticket.usage)
        elif self.written or isinstance(exc, _UNSEEN):
            # its end was not seen, and the service charges for it nevertheless
            ticket.guess(self._estimates.sent(self._call, self.written))
        self._budget.settle(hold, ticket.cost)
        self._limiter.leave(ticket)
