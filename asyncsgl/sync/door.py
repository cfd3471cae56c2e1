"""How a plain ``def`` body in a thread of its own reaches its run, and may block."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, ParamSpec

from ..errors import ClosedError
from ..program.variable import Variable

__all__ = ["ThreadDoor"]

P = ParamSpec("P")


class ThreadDoor:
    """Runs a body in a worker thread, where reading a variable blocks and gives its text.

    When the run is cancelled, whatever the body waits for raises ``asyncio.CancelledError``
    in its thread, so that the body ends; the run waits for that.
    """

    __slots__ = ("_changed", "_lock", "_loop", "_open", "_tasks", "_waits")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._lock = threading.Lock()
        self._open = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._waits: set[Future[Any]] = set()

    def call(self, function: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function`` on the event loop, after all earlier calls.

        Raises:
            ClosedError: the run has ended.
        """
        self._check()

        def called() -> None:
            function(*args, **kwargs)
            self._tell()

        self._loop.call_soon_threadsafe(called)

    def read(self, variable: Variable) -> Any:
        """Wait for the variable and give its text."""

        async def read() -> Any:
            return await variable

        return variable.text if variable.done() else self.ask(read)

    def ask(self, question: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Wait for the answer.

        Raises:
            ClosedError: the run has ended.
            asyncio.CancelledError: the run was cancelled meanwhile.
        """
        future: Future[Any] = Future()
        with self._lock:
            self._check()
            self._waits.add(future)
        self._loop.call_soon_threadsafe(self._start, question, future)
        try:
            return future.result()
        finally:
            with self._lock:
                self._waits.discard(future)

    def _check(self) -> None:
        if not self._open:
            raise ClosedError("the run of this program has ended: its state cannot be used on")

    def _start(self, question: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any]) -> None:
        task = self._loop.create_task(_answer(question, future))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._tell()

    def _tell(self) -> None:
        """Wake whoever looks at what the body does."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def pause(self, enough: Callable[[], bool]) -> None:
        """Return when the body waits or has ended, or what it has appended is ``enough``."""
        while self._open and not self._tasks and not enough():
            await self._changed.wait()

    async def run_body(
        self, body: Callable[..., Any], state: object, arguments: Mapping[str, object]
    ) -> object:
        """Run the function in a thread, to its end also when cancelled."""
        finished: asyncio.Future[object] = self._loop.create_future()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                value = context.run(body, state, **arguments)
            except BaseException as error:  # noqa: BLE001 - carried to the run, which raises it
                self._loop.call_soon_threadsafe(_settle, finished, None, error)
            else:
                self._loop.call_soon_threadsafe(_settle, finished, value, None)

        threading.Thread(target=work, name="asyncsgl-program", daemon=True).start()
        try:
            value = await asyncio.shield(finished)
            return await value if inspect.isawaitable(value) else value
        except asyncio.CancelledError:
            await self._close()
            await asyncio.wait([finished])
            raise
        finally:
            await self._close()

    async def _close(self) -> None:
        """Refuse further use, and make everything that waits raise CancelledError."""
        with self._lock:
            self._open = False
            waits = list(self._waits)
        self._tell()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for future in waits:
            if not future.done():
                future.set_exception(asyncio.CancelledError())


async def _answer(question: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any]) -> None:
    try:
        answer = await question()
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        future.set_result(answer)


def _settle(finished: asyncio.Future[object], value: object, error: BaseException | None) -> None:
    if finished.done():
        return
    if error is None:
        finished.set_result(value)
    elif isinstance(error, asyncio.CancelledError):
        finished.cancel()
    else:
        finished.set_exception(error)
