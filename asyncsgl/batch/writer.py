"""A thread that appends lines to a file, many at a time, and tells when they are written."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from queue import Empty, SimpleQueue

from ..errors import BatchError
from .waiting import ended

__all__ = ["LineWriter"]

_SYNC_SECONDS = 1.0


class LineWriter:
    """Writes lines in the order they are handed over, without blocking the event loop.

    All lines that wait go out in one write, and the loop is woken once for all of them. The
    file is forced to the disk when a second has passed since unforced lines were written,
    and on closing. After a failed write nothing more is written.

    Args:
        fd: a descriptor that appends.
        name: how errors call the file.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._inbox: SimpleQueue[tuple[bytes, asyncio.Future[None]] | None] = SimpleQueue()
        self._failure: OSError | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, name="asyncsgl-journal", daemon=True).start()

    def write(self, line: bytes) -> asyncio.Future[None]:
        """Hand over a line; the future is done when the operating system has it.

        The future raises BatchError if the line, or one before it, could not be written.
        """
        written: asyncio.Future[None] = self._loop.create_future()
        self._inbox.put((line, written))
        return written

    async def close(self) -> None:
        """Write what waits, force it to the disk and end the thread.

        Raises:
            BatchError: something could not be written.
        """
        self._inbox.put(None)
        await ended(self._ended)
        if self._failure is not None:
            raise self._error(self._failure)

    def _work(self) -> None:
        unsynced_since: float | None = None
        closing = False
        while not closing:
            batch, closing = self._take(unsynced_since)
            if batch:
                self._write(batch)
                unsynced_since = unsynced_since or time.monotonic()
            if unsynced_since and (closing or time.monotonic() - unsynced_since >= _SYNC_SECONDS):
                self._sync()
                unsynced_since = None
        self._loop.call_soon_threadsafe(self._ended.set_result, None)

    def _take(
        self, unsynced_since: float | None
    ) -> tuple[list[tuple[bytes, asyncio.Future[None]]], bool]:
        """What waits, and whether that is the end; nothing if it is time to force the disk."""
        wait = None
        if unsynced_since is not None:
            wait = max(0.0, unsynced_since + _SYNC_SECONDS - time.monotonic())
        taken: list[tuple[bytes, asyncio.Future[None]]] = []
        try:
            item = self._inbox.get(timeout=wait)
            while item is not None:
                taken.append(item)
                item = self._inbox.get_nowait()
        except Empty:
            return taken, False
        return taken, True

    def _write(self, batch: list[tuple[bytes, asyncio.Future[None]]]) -> None:
        if self._failure is None:
            data = memoryview(b"".join(line for line, _ in batch))
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError as error:
                self._failure = error
        self._loop.call_soon_threadsafe(self._tell, [written for _, written in batch])

    def _sync(self) -> None:
        if self._failure is None:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._failure = error

    def _tell(self, written: list[asyncio.Future[None]]) -> None:
        for future in written:
            if future.done():
                continue
            if self._failure is None:
                future.set_result(None)
            else:
                future.set_exception(self._error(self._failure))

    def _error(self, failure: OSError) -> BatchError:
        error = BatchError(f"cannot write {self._name}: {failure.strerror}")
        error.__cause__ = failure
        return error
