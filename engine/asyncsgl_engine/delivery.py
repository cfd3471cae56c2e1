"""Carries deltas from the engine's thread to those who wait in event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from .request import Completion, Delta, Request

__all__ = ["Ticket", "deliver"]


class Ticket:
    """One request's receiving end, in one event loop.

    Args:
        request: what was asked for.
        loop: where its deltas are wanted.
    """

    __slots__ = ("_arrived", "_deltas", "_patient", "done", "loop", "request")

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.loop = loop
        self.done = False
        self._deltas: list[Delta] = []
        self._arrived: asyncio.Future[None] | None = None
        self._patient = False  # who waits wants the end alone

    def put(self, delta: Delta) -> None:
        """Take a delta; called in the ticket's loop."""
        self._deltas.append(delta)
        if self._patient and delta.finish is None and delta.error is None:
            return
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def take(self) -> list[Delta]:
        """Wait for deltas and take all there are.

        Raises:
            EngineError: the request failed.
        """
        if not self._deltas:
            self._arrived = self.loop.create_future()
            await self._arrived
        deltas, self._deltas = self._deltas, []
        last = deltas[-1]
        if last.error is None:
            self.done = last.finish is not None
        elif len(deltas) > 1:
            deltas, self._deltas = deltas[:-1], [last]
        else:
            self.done = True
            raise last.error
        return deltas

    async def completion(self) -> Completion:
        """Wait for the end; all deltas as one.

        Nobody is woken before it: a task for each request in each step would take time on the
        cores that compute the next.

        Raises:
            EngineError: the request failed.
        """
        self._patient = True
        deltas: list[Delta] = []
        while not self.done:
            deltas += await self.take()
        return joined(deltas)


def joined(deltas: list[Delta]) -> Completion:
    """All of a request's deltas as one completion."""
    finish = deltas[-1].finish
    assert finish is not None, "only a request that ended well is complete"
    return Completion(
        request_id=deltas[-1].request_id,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        finish=finish,
    )


def deliver(parcels: Iterable[tuple[Ticket, Delta]]) -> list[Ticket]:
    """Hand deltas over, with one wake for each event loop.

    Returns:
        Tickets whose loop is closed, so that nobody will ever take their deltas.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Delta]]] = {}
    for ticket, delta in parcels:
        by_loop.setdefault(ticket.loop, []).append((ticket, delta))
    lost: list[Ticket] = []
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, mine)
        except RuntimeError:
            lost += [ticket for ticket, _ in mine]
    return lost


def _put_all(parcels: list[tuple[Ticket, Delta]]) -> None:
    for ticket, delta in parcels:
        ticket.put(delta)
