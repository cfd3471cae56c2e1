"""One event loop in a background thread, and blocking calls into it."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from ..errors import ProgramError

__all__ = ["PORTAL", "Portal"]

T = TypeVar("T")
Cancel = Callable[[], None]


class Portal:
    """Runs coroutines on an event loop of its own, for callers that block.

    The loop's thread starts with the first call and ends with the process. Any number of
    threads may call at once. Ctrl-C in a blocking call cancels the coroutine, waits for its
    end, and raises KeyboardInterrupt; a second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    @property
    def here(self) -> bool:
        """Whether this is the loop's own thread."""
        return threading.current_thread() is self._thread and self._pid == os.getpid()

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, started if it is not running in this process."""
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._start()
            assert self._loop is not None
            return self._loop

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="asyncsgl-portal", daemon=True
        )
        self._thread.start()
        atexit.register(_wind_up, self._loop, self._pid)

    def submit(self, function: Callable[[], Coroutine[Any, Any, T]]) -> tuple[Future[T], Cancel]:
        """Start a coroutine on the loop: its future, and how to cancel it.

        The future is done when the coroutine has ended, also when it was cancelled.
        """
        loop = self.loop()
        future: Future[T] = Future()
        context = contextvars.copy_context()
        tasks: list[asyncio.Task[T]] = []

        def finished(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                future.set_exception(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result())

        def start() -> None:
            task = loop.create_task(function(), context=context)
            tasks.append(task)
            task.add_done_callback(finished)

        def cancel() -> None:
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])

        loop.call_soon_threadsafe(start)
        return future, cancel

    def call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the loop and wait for its result.

        Raises:
            ProgramError: called from the loop's own thread, which would wait for itself.
            Exception: the coroutine's.
        """
        if self.here:
            raise ProgramError(
                "a blocking call inside an `async def` program would wait for itself: "
                "use `import asyncsgl` and await there, or make the program a plain `def`"
            )
        future, cancel = self.submit(function)
        try:
            return future.result()
        except KeyboardInterrupt:
            if not future.done():
                cancel()
                future.exception()
            raise


def _wind_up(loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """Close the connections that live on the loop, while its thread is still there."""
    if pid != os.getpid():
        return
    closing = asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop)
    with suppress(TimeoutError):
        closing.result(2.0)


PORTAL = Portal()
"""The one portal of this process."""
