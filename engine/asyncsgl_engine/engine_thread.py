"""The thread that loads a model and then steps it, until it is told to end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from .config import EngineConfig
from .errors import InternalError, RankFailed
from .reception import Reception
from .statistics import Statistics

if TYPE_CHECKING:
    from .hub import Progress
    from .loading import Loaded

__all__ = ["EngineThread"]

T = TypeVar("T")


class EngineThread:
    """The one owner of a core.

    Args:
        config: what to load.
        reception: where its work comes in; a fault closes it.
    """

    def __init__(self, config: EngineConfig, reception: Reception) -> None:
        self._config = config
        self._reception = reception
        self._lock = threading.Lock()
        self._started: Future[None] | None = None
        self._thread: threading.Thread | None = None
        self.loaded: Loaded | None = None
        self.statistics: Statistics | None = None

    def start(self, progress: Progress | None) -> Future[None]:
        """Begin to load, unless that was begun already; after a failure, begin again.

        Args:
            progress: called on the thread with a stage and the share of it that is done.

        Returns:
            done when the model is loaded, or could not be.

        Raises:
            Closed: it was told to end.
        """
        with self._lock:
            self._reception.refuse_if_closed()
            started = self._started
            if started is None:
                started = self._started = Future()
                self._thread = threading.Thread(
                    target=self._main, args=(started, progress), name="asyncsgl-engine", daemon=True
                )
                self._thread.start()
        return started

    def shutdown(self) -> None:
        """End after the step in progress, and wait for that unless this is the thread itself."""
        self._reception.close()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def ask(self, loaded: Loaded, work: Callable[[Loaded], T], when_idle: bool) -> Future[T]:
        """Run a function on the thread, between steps.

        Args:
            loaded: what is passed to it.
            work: the function.
            when_idle: run it when no request runs.

        Raises:
            Closed: the thread ends.
        """
        done: Future[T] = Future()

        def call() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = work(loaded)
                self.statistics = loaded.core.statistics()
                done.set_result(result)
            except Exception as error:  # noqa: BLE001 - handed to the caller
                done.set_exception(error)

        self._reception.ask(call, done, when_idle)
        return done

    def _main(self, started: Future[None], progress: Progress | None) -> None:
        try:
            from .starting import start

            loaded = start(self._config, progress or _ignore, self._reception.close)
            loaded.constraints.when_compiled(self._reception.wake)
            self.statistics = loaded.core.statistics()
        except Exception as error:  # noqa: BLE001 - handed to the callers of start
            with self._lock:
                self._started = None
            started.set_exception(error)
            return
        self.loaded = loaded
        started.set_result(None)
        try:
            while self._turn(loaded):
                pass
        except RankFailed as error:
            self._reception.close(error)
        except Exception as error:  # noqa: BLE001 - handed to all requests
            fault = InternalError(f"the engine's thread failed: {error!r}")
            fault.__cause__ = error
            self._reception.close(fault)
        self._end(loaded)

    def _turn(self, loaded: Loaded) -> bool:
        """Wait for work and do one step of it; False when it is time to end."""
        core = loaded.core
        inbox = self._reception.take(core)
        if inbox is None:
            return False
        deltas = core.step(inbox.new.values(), inbox.left | inbox.aborted)
        self.statistics = core.statistics()
        for call in inbox.calls:
            call()
        if not core.busy:
            for each in self._reception.take_patient():
                each.call()
        self._reception.route(deltas, inbox.left)
        return True

    def _end(self, loaded: Loaded) -> None:
        self._reception.end()
        loaded.core.fail_all(self._reception.farewell)
        self.statistics = loaded.core.statistics()
        loaded.resources.close()
        self.loaded = None


def _ignore(stage: str, fraction: float | None) -> None:
    """The progress nobody asked for."""
