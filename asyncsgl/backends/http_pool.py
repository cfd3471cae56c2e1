"""The connections of one event loop to one server, and the line of those who wait for one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from ..errors import ClosedError
from .http import KEEPALIVE
from .http_connection import Connection

__all__ = ["Pool"]

Lost = Callable[[Connection], None]


class Pool:
    """At most ``limit`` connections; every step of a request costs the same for any number.

    A connection that comes free goes to who has waited longest. Who finds no one waiting takes
    the one that was used last, so that the rest grow old and are closed.

    Args:
        limit: connections at once, those that are being made included.
        make: makes a connection that is not connected yet, given whom to tell of its end.
        connect: connects one.
    """

    def __init__(
        self,
        limit: int,
        make: Callable[[Lost], Connection],
        connect: Callable[[Connection], Awaitable[None]],
    ) -> None:
        self._limit = limit
        self._make = make
        self._connect = connect
        self._all: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._line: OrderedDict[asyncio.Future[Connection], None] = OrderedDict()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self) -> Connection | None:
        """An idle connection, if there is one."""
        if not self._idle:
            return None
        oldest = asyncio.get_running_loop().time() - KEEPALIVE
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.usable and connection.last > oldest:
                return connection
            connection.abort()
        return None

    async def get(self) -> Connection:
        """A connection, as soon as there is one; for those for whom :meth:`take` has none.

        Raises:
            BackendTimeout: the server took too long to accept it.
            BackendConnectionError: the server cannot be reached, or not trusted.
            ClosedError: the pool is closed.
        """
        while not self._closed:
            full = len(self._all) >= self._limit
            connection = await self._turn() if full else self._placed()
            if not connection.made:
                await self._made(connection)
            if connection.usable:
                return connection
            self.put(connection)  # closed since it was handed over
        raise ClosedError("this backend is closed: make a new one")

    def put(self, connection: Connection) -> None:
        """Give back a connection whose exchange is over, or another that was not used."""
        if not connection.made:
            self._lost(connection)
        elif self._closed or not connection.usable:
            connection.abort()
        elif (waiting := self._first()) is not None:
            waiting.set_result(connection)
        else:
            self._idle[connection] = None
            self._sweep_later()

    async def aclose(self) -> None:
        """Close all connections; exchanges under way fail, and so does the line."""
        self._closed = True
        while (waiting := self._first()) is not None:
            waiting.set_exception(ClosedError("this backend is closed: make a new one"))
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._all):
            connection.abort()
        await asyncio.sleep(0)  # the transports say goodbye in the loop's next turn

    async def _made(self, connection: Connection) -> None:
        """Connect it; its place is free again where that fails."""
        try:
            await self._connect(connection)
        except BaseException:
            self._lost(connection)
            connection.abort()
            raise

    async def _turn(self) -> Connection:
        """Wait for a connection, or for the place of one that was closed."""
        turn: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._line[turn] = None
        try:
            return await turn
        except asyncio.CancelledError:
            self._line.pop(turn, None)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.put(turn.result())
            raise

    def _placed(self) -> Connection:
        """A connection that takes a place, to be connected."""
        connection = self._make(self._lost)
        self._all.add(connection)
        return connection

    def _lost(self, connection: Connection) -> None:
        """Its place is free."""
        self._idle.pop(connection, None)
        if connection not in self._all:
            return
        self._all.remove(connection)
        if len(self._all) < self._limit and (waiting := self._first()) is not None:
            waiting.set_result(self._placed())

    def _first(self) -> asyncio.Future[Connection] | None:
        """Who waits longest, out of the line."""
        while self._line:
            waiting, _ = self._line.popitem(last=False)
            if not waiting.done():
                return waiting
        return None

    def _sweep_later(self) -> None:
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEPALIVE / 2, self._close_old)

    def _close_old(self) -> None:
        """Close what was idle for too long; the oldest come first."""
        self._sweep = None
        oldest = asyncio.get_running_loop().time() - KEEPALIVE
        old: list[Connection] = []
        for connection in self._idle:
            if connection.last > oldest:
                break
            old.append(connection)
        for connection in old:
            del self._idle[connection]
            connection.abort()
        if self._idle:
            self._sweep_later()
