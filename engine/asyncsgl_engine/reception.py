"""Where event loops hand requests in, and the engine's thread takes them and hands answers out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from .delivery import Ticket, deliver
from .errors import Closed, EngineError, InvalidRequest, Overloaded
from .inbox import Inbox, Patient
from .request import Delta, Finish, Request

if TYPE_CHECKING:
    from .core import EngineCore

__all__ = ["Reception"]


class Reception:
    """Who waits for what, and what came in since the last step; behind one lock.

    Event loops call the first half of the methods, the engine's thread the second. It closes
    once, when it is told to or at a fault.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._inbox = Inbox()
        self._tickets: dict[str, Ticket] = {}
        self._when_idle: list[Patient] = []
        self._closed = False
        self._fault: EngineError | None = None

    @property
    def closed(self) -> bool:
        """Whether it was told to close, or a fault closed it."""
        return self._closed

    @property
    def fault(self) -> EngineError | None:
        """Why it closed by itself, if it did."""
        return self._fault

    def refuse_if_closed(self) -> None:
        """Raise the fault, or `Closed`, from the end on."""
        if self._fault is not None:
            raise self._fault
        if self._closed:
            raise Closed("the engine is shut down; make a new one")

    def close(self, fault: EngineError | None = None) -> None:
        """Take nothing in any more and wake the engine's thread, which then ends.

        Args:
            fault: why; the first one given stands.
        """
        with self._lock:
            self._closed = True
            self._fault = self._fault or fault
            self._lock.notify()

    # -- for event loops ------------------------------------------------------------------------

    def submit(self, request: Request, waiting: int, limit: int) -> Ticket:
        """Hand a request in; called in the event loop that waits for it.

        Args:
            request: its id not in use.
            waiting: requests that the scheduler's queue had after the last step.
            limit: how many may wait.

        Raises:
            Overloaded: too many wait.
            InvalidRequest: the id is in use.
            Closed: nothing is taken in any more.
        """
        ticket = Ticket(request, asyncio.get_running_loop())
        name = request.request_id
        with self._lock:
            self.refuse_if_closed()
            if name in self._tickets:
                raise InvalidRequest("request_id", f"{name!r} is in use by a running request")
            waiting += len(self._inbox.new)
            if waiting >= limit:
                raise Overloaded(waiting, limit)
            self._tickets[name] = ticket
            self._inbox.new[name] = request
            self._lock.notify()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for this ticket any more."""
        name = ticket.request.request_id
        with self._lock:
            if self._tickets.get(name) is not ticket:
                return
            del self._tickets[name]
            self._inbox.aborted.discard(name)
            if self._inbox.new.pop(name, None) is None:
                self._inbox.left.add(name)
                self._lock.notify()

    def abort(self, name: str) -> None:
        """End a request, which whoever waits for it is told; an unknown id is ignored."""
        with self._lock:
            ticket = self._tickets.get(name)
            if ticket is None:
                return
            if self._inbox.new.pop(name, None) is None:
                self._inbox.aborted.add(name)
                self._lock.notify()
                return
            del self._tickets[name]
        deliver([(ticket, _never_begun(ticket.request))])

    def ask(self, call: Callable[[], None], done: Future[Any], when_idle: bool) -> None:
        """Have the engine's thread call something between two steps.

        Args:
            call: does it, and sets `done`.
            done: cancelled by who does not want it any more.
            when_idle: wait until no request runs; new ones wait behind it.

        Raises:
            Closed: nothing is taken in any more.
        """
        with self._lock:
            self.refuse_if_closed()
            if when_idle:
                self._when_idle.append(Patient(done, call))
            else:
                self._inbox.calls.append(call)
            self._lock.notify()

    def wake(self) -> None:
        """Have the engine's thread look again at what there is to do; any thread may."""
        with self._lock:
            self._lock.notify()

    # -- for the engine's thread ------------------------------------------------------------------

    def take(self, core: EngineCore) -> Inbox | None:
        """Wait until there is something for the core to do, and take what came in.

        Returns:
            None when it is time to end.
        """
        with self._lock:
            while not (self._closed or core.can_step or self._told(core) or self._may_call(core)):
                self._lock.wait()
            if self._closed:
                return None
            inbox, self._inbox = self._inbox, Inbox()
            if self._holds(core):
                self._inbox.hold_new(inbox)
        return inbox

    def take_patient(self) -> list[Patient]:
        """Take the calls that waited for idleness, which has come."""
        with self._lock:
            calls, self._when_idle = self._when_idle, []
        return calls

    def route(self, deltas: Sequence[Delta], left: set[str]) -> None:
        """Hand a step's deltas to those who wait for them.

        Args:
            deltas: of the step.
            left: requests that were aborted in it because nobody waited any more.
        """
        parcels: list[tuple[Ticket, Delta]] = []
        with self._lock:
            for delta in deltas:
                if _is_farewell(delta, left):
                    continue
                ended = delta.finish is not None or delta.error is not None
                name = delta.request_id
                ticket = self._tickets.pop(name, None) if ended else self._tickets.get(name)
                if ticket is not None:
                    parcels.append((ticket, delta))
        for ticket in deliver(parcels):
            self.leave(ticket)

    def end(self) -> None:
        """Close, and end what is left, so that nobody waits for ever."""
        with self._lock:
            self._closed = True
            left, self._tickets = list(self._tickets.values()), {}
            calls = [*self._inbox.calls, *(each.call for each in self._when_idle)]
            self._inbox, self._when_idle = Inbox(), []
        for call in calls:
            call()
        deliver((ticket, Delta(ticket.request.request_id, error=self.farewell)) for ticket in left)

    @property
    def farewell(self) -> EngineError:
        """What requests end with that are there when it closes."""
        return self._fault or Closed("the engine was shut down while this request was in it")

    def _holds(self, core: EngineCore) -> bool:
        """Whether new requests wait behind somebody who waits for idleness."""
        self._when_idle = [each for each in self._when_idle if not each.done.cancelled()]
        return bool(self._when_idle) and core.busy

    def _told(self, core: EngineCore) -> bool:
        """Whether something came in that can be acted on."""
        inbox = self._inbox
        if inbox.left or inbox.calls or inbox.aborted - inbox.new.keys():
            return True
        return bool(inbox.new) and not self._holds(core)

    def _may_call(self, core: EngineCore) -> bool:
        """Whether somebody waits for idleness, and it has come."""
        return bool(self._when_idle) and not core.busy


def _is_farewell(delta: Delta, left: set[str]) -> bool:
    """Whether this is the abort of a request whose caller is gone; its id may be in use again."""
    finish = delta.finish
    return finish is not None and finish.reason == "abort" and delta.request_id in left


def _never_begun(request: Request) -> Delta:
    """The end of a request that was aborted before the engine's thread saw it."""
    finish = Finish("abort", None, len(request.prompt_ids), 0, 0, 0.0, 0.0, 0.0)
    return Delta(request.request_id, finish=finish)
