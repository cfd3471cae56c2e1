"""One HTTP/1.1 connection, with one exchange at a time; httptools (llhttp) reads the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from .._optional import needs
from ..errors import BackendConnectionError, BackendError, BackendTimeout, ClosedError
from .http_answer import Answer, Part

with needs("http"):
    from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

__all__ = ["Connection"]

ONE_PIECE = 2**16
"""Bytes of a body up to which it is sent in one piece with its head."""
MOST_HEAD = 2**16
"""Bytes of an answer's head, or of its trailer."""


class Connection(asyncio.BufferedProtocol):
    """One connection to a server.

    It makes no task and no timer for an exchange: one timer lives as long as the connection is
    used and, when it rings, looks at the time of the last byte. Nor does it make room for what
    it reads, which for small answers costs more than all the rest.

    Args:
        where: the server's address, for errors.
        timeout: seconds without a byte from the server, in an exchange.
        room: to read into; connections of one event loop may share it, since what was read
            is parsed before the next reads.
        lost: called when the connection is closed, once.

    Attributes:
        last: when the last byte came, by the event loop's clock.
        reused: an exchange on it is over and another may follow or has begun.
        heard: a byte of the answer under way has come.
    """

    __slots__ = (
        "_answer",
        "_bodiless",
        "_broken",
        "_head_size",
        "_loop",
        "_lost",
        "_overhead",
        "_parser",
        "_paused",
        "_room",
        "_timeout",
        "_timer",
        "_transport",
        "_unsent",
        "_where",
        "heard",
        "last",
        "reused",
    )

    def __init__(
        self, where: str, timeout: float, room: memoryview, lost: Callable[[Connection], None]
    ) -> None:
        self.last = 0.0
        self.reused = False
        self.heard = False
        self._where = where
        self._timeout = timeout
        self._room = room
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = None
        self._answer: Answer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._broken = False  # no exchange may follow
        self._paused = False
        self._bodiless = False
        self._head_size = 0
        self._overhead = 0
        self._unsent = 0

    @property
    def made(self) -> bool:
        """Whether there is a connection already."""
        return self._transport is not None

    @property
    def usable(self) -> bool:
        """Whether an exchange may begin."""
        transport = self._transport
        return not (self._broken or transport is None or transport.is_closing())

    def begin(
        self, head: bytes, body: bytes | None, wanted: Part, *, bodiless: bool = False
    ) -> Answer:
        """Send a request.

        Args:
            head: its first lines, up to the empty one.
            body: what follows.
            wanted: what of the answer is waited for first.
            bodiless: the answer has no body, whatever its head says.
        """
        assert self._transport is not None and self._answer is None, "one exchange at a time"
        answer = self._answer = Answer(wanted, self._hold)
        self.heard = False
        self._bodiless = bodiless
        self._head_size = self._overhead = self._unsent = 0
        self.last = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._look)
        if body is None:
            self._transport.write(head)
        elif len(body) <= ONE_PIECE:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        return answer

    def end(self) -> bool:
        """The exchange is over; True if another may begin, else the connection is closed."""
        answer, self._answer = self._answer, None
        self.reused = True
        if answer is not None and answer.whole and self.usable and not self._stuck():
            return True
        self.abort()
        return False

    def abort(self, error: Exception | None = None) -> None:
        """Close it now; an exchange under way fails with ``error``."""
        self._broken = True
        if self._answer is not None:
            self._answer.fail(error or ClosedError("this backend is closed: make a new one"))
        if self._transport is not None:
            self._transport.abort()

    # -- the transport's calls ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready to send."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's have no such base
        self._parser = HttpResponseParser(self)
        if self._broken:  # given up meanwhile; uvloop bears no abort in this call
            self._loop.call_soon(self._transport.abort)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - all there is
        """Where to put what comes."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of an answer; a server that says something unasked is left."""
        self.last = self._loop.time()
        if self._answer is None or self._parser is None:
            self.abort()
            return
        self.heard = True
        self._overhead += nbytes
        try:
            self._parser.feed_data(self._room[:nbytes])
        except (HttpParserError, HttpParserUpgrade) as error:
            self._malformed(error)
        if self._overhead > MOST_HEAD:
            self._oversized()

    def eof_received(self) -> None:
        """The server has closed: where that is how its answer ends, it has ended."""
        answer = self._answer
        self._broken = True
        if answer is not None and not answer.whole and answer.ends_with_its_connection():
            answer.end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed, by whichever side."""
        self._broken = True
        self._parser = None  # it holds this object
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._answer is not None:
            until = "its answer was whole" if self.heard else "it answered"
            said = str(exc or "") or f"the server closed it before {until}"
            self._answer.fail(self._failure(said))
        self._lost(self)

    # -- the parser's calls ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins; a second one is nobody's."""
        if self._answer is None or self._answer.whole:
            self._broken = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of a head or of a trailer; trailers are not kept."""
        answer = self._answer
        self._head_size += len(name) + len(value)
        if answer is not None and not answer.status:
            answer.header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        answer, parser = self._answer, self._parser
        if answer is None or parser is None or self._broken:
            return
        status = parser.get_status_code()
        if self._head_size > MOST_HEAD:
            self._oversized()
        elif status == 101:
            self.abort(self._failure("the server changes to a protocol that nobody asked for"))
        elif status < 200:
            answer.interim()
        else:
            self._overhead = 0
            answer.head(status)
            if self._bodiless:
                self._broken = True
                answer.end()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        answer = self._answer
        if answer is None or answer.whole or answer.failed is not None:
            return
        self._overhead = 0
        answer.body(data)
        if answer.too_large:
            self.abort(BackendError(f"the answer of {self._where} is larger than 1 GiB"))

    def on_message_complete(self) -> None:
        """An answer is whole; of an interim one, another follows."""
        answer, parser = self._answer, self._parser
        if answer is None or parser is None or not answer.status or answer.failed is not None:
            return
        self._overhead = 0
        self._broken = self._broken or not parser.should_keep_alive()
        answer.end()

    # -- the rest -------------------------------------------------------------------------------

    def _stuck(self) -> bool:
        """Whether something of the exchange is left: of the request, or read by nobody."""
        transport = self._transport
        return self._paused or transport is None or transport.get_write_buffer_size() > 0

    def _malformed(self, error: Exception) -> None:
        """What came is not HTTP; behind a whole answer it spoils only the connection."""
        self.abort(self._failure(f"the answer is not HTTP/1.1: {error}"))

    def _oversized(self) -> None:
        answer = self._answer
        if answer is not None and not answer.whole:
            message = f"the head or trailer of an answer of {self._where} is larger than 64 KiB"
            self.abort(BackendError(message))

    def _failure(self, said: str) -> BackendConnectionError:
        return BackendConnectionError(f"the connection to {self._where} failed: {said}")

    def _hold(self, hold: bool) -> None:
        """Let the server wait, or let it go on."""
        if self._transport is None or self._transport.is_closing():
            return
        self._paused = hold
        self.last = self._loop.time()
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _look(self) -> None:
        """Give up a server that is silent; one that still takes the request is not."""
        self._timer = None
        answer, transport = self._answer, self._transport
        if answer is None or answer.whole or transport is None:
            return
        unsent, before = transport.get_write_buffer_size(), self._unsent
        self._unsent = unsent
        if self._paused or (unsent and unsent != before):
            self.last = self._loop.time()
        left = self.last + self._timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            seconds = f"{self._timeout:g} seconds"
            self.abort(BackendTimeout(f"{self._where} was silent for more than {seconds}"))
