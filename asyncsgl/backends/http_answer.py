"""One answer as it comes in, and those who wait for it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Mapping

__all__ = ["Answer", "Part"]

HIGH_WATER = 2**18
"""Bytes of a streamed body that may wait to be read; the server has to wait for more."""
MOST_BODY = 2**30
"""Bytes of a body that is read as a whole."""


class Part(enum.IntEnum):
    """What of an answer is waited for."""

    HEAD = 0
    PIECE = 1
    WHOLE = 2


class Answer(AsyncIterator[bytes]):
    """One answer; a connection tells it what comes, its reader waits.

    Args:
        wanted: what is waited for first.
        held: called with True where no more bytes should come for now, with False where
            they should again.

    Attributes:
        status: the HTTP status; 0 before the head has come.
        whole: all of it has come.
        failed: why no more of it will come.
    """

    __slots__ = (
        "_chunks",
        "_held",
        "_holding",
        "_pairs",
        "_size",
        "_waiter",
        "_wanted",
        "failed",
        "status",
        "whole",
    )

    def __init__(self, wanted: Part, held: Callable[[bool], None]) -> None:
        self.status = 0
        self.whole = False
        self.failed: Exception | None = None
        self._wanted = wanted
        self._held = held
        self._holding = False
        self._pairs: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None

    # -- what its reader asks ---------------------------------------------------------------

    @property
    def headers(self) -> Mapping[str, str]:
        """By their names in small letters."""
        found: dict[str, str] = {}
        for name, value in self._pairs:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            found[key] = f"{found[key]}, {text}" if key in found else text
        return found

    def comes(self, wanted: Part) -> asyncio.Future[None]:
        """Done when ``wanted`` has come, and failed if it will not."""
        waiter = asyncio.get_running_loop().create_future()
        self._wanted = wanted
        if self.failed is not None:
            waiter.set_exception(self.failed)
        elif self.whole or (wanted is Part.HEAD and self.status):
            waiter.set_result(None)
        else:
            self._waiter = waiter
        return waiter

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            BackendError: the connection broke, or the body is larger than 1 GiB.
        """
        self._hold(False)
        await self.comes(Part.WHOLE)
        return self.taken()

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, cut anywhere; raises as :meth:`read`."""
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self.whole:
                raise StopAsyncIteration
            await self.comes(Part.PIECE)
        data = self.taken()
        self._hold(False)
        return data

    def taken(self) -> bytes:
        """What has come of the body and was not taken yet."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        return data

    # -- what its connection tells ------------------------------------------------------------

    def header(self, name: bytes, value: bytes) -> None:
        """One line of the head."""
        self._pairs.append((name, value))

    def interim(self) -> None:
        """That was the head of an interim answer, which means nothing here."""
        self._pairs.clear()

    def head(self, status: int) -> None:
        """The head is there."""
        self.status = status
        if self._wanted is Part.HEAD:
            self._wake()

    def body(self, data: bytes) -> None:
        """A piece of the body."""
        self._chunks.append(data)
        self._size += len(data)
        if self._wanted is not Part.WHOLE:
            if self._size > HIGH_WATER:
                self._hold(True)
            if self._wanted is Part.PIECE:
                self._wake()

    @property
    def too_large(self) -> bool:
        """Whether more of its body has come than anybody should keep."""
        return self._size > MOST_BODY

    def end(self) -> None:
        """That was all of it."""
        self.whole = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """No more of it will come."""
        if self.whole or self.failed is not None:
            return
        self.failed = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def ends_with_its_connection(self) -> bool:
        """Whether only the end of the connection tells the end of the body."""
        headers = self.headers
        coding = headers.get("transfer-encoding", "").rpartition(",")[2].strip().lower()
        return bool(self.status) and coding != "chunked" and "content-length" not in headers

    def _hold(self, hold: bool) -> None:
        if hold is not self._holding:
            self._holding = hold
            self._held(hold)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
