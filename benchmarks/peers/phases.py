"""Where a thread's time goes, by looking at its stack every few milliseconds.

The stack is looked at from another thread, which needs the interpreter's lock for that; what
holds the lock for long is seen a little too seldom. Native code without the lock is seen as the
line that called it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

__all__ = ["ThreadWatch"]

_PACKAGE = "asyncsgl_engine"
_PHASES = {
    "forward": (
        "attention",
        "device",
        "forward",
        "graphs",
        "inputs",
        "kv_cache",
        "lowering",
        "model",
        "native",
        "runner",
    ),
    "sampling": ("logits", "logprobs", "sampler"),
    "planning": ("pages", "plan", "radix", "scheduler", "sequence"),
    "constraints": ("constraints", "grammar"),
    "text and stops": ("answer", "detokenizer", "stops", "tokenizer"),
    "core": ("core", "request", "statistics"),
    "delivery": ("delivery", "engine"),
}
_PHASE_OF = {part: phase for phase, parts in _PHASES.items() for part in parts}


def _place(frame: FrameType) -> str | None:
    """The part of the engine that a frame belongs to: a module or a folder of modules."""
    parts = Path(frame.f_code.co_filename).parts
    if _PACKAGE not in parts:
        return None
    below = parts[len(parts) - parts[::-1].index(_PACKAGE) :]
    return below[0].removesuffix(".py")


def _phase(frame: FrameType | None) -> str:
    """What a thread with this innermost frame is doing."""
    if frame is not None and frame.f_code.co_filename == threading.__file__:
        return "idle"
    while frame is not None:
        place = _place(frame)
        if place is not None:
            return _PHASE_OF.get(place, place)
        frame = frame.f_back
    return "other"


class ThreadWatch:
    """`with ThreadWatch(name) as watch: ...`, then `watch.phases()`.

    Args:
        name: of the thread to look at, or how it begins.
        interval_s: between looks.
    """

    def __init__(self, name: str, interval_s: float = 0.003) -> None:
        self._name = name
        self._interval_s = interval_s
        self._seen: Counter[str] = Counter()
        self._end = threading.Event()
        self._looker = threading.Thread(target=self._look, name="looker", daemon=True)
        self._begun = self._caller_begun = self._wall_s = self._caller_s = 0.0

    def __enter__(self) -> Self:
        self._begun, self._caller_begun = time.perf_counter(), time.thread_time()
        self._looker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._caller_s = time.thread_time() - self._caller_begun
        self._wall_s = time.perf_counter() - self._begun
        self._end.set()
        self._looker.join()

    def phases(self) -> dict[str, float]:
        """Share of the wall time by phase, the largest first.

        The thread that made the watch computes beside it; its share comes last, as CPU time.
        """
        total = sum(self._seen.values()) or 1
        shares = {phase: count / total for phase, count in self._seen.most_common()}
        shares["event loop (beside it)"] = self._caller_s / self._wall_s
        return shares

    def _look(self) -> None:
        watched = [t.ident for t in threading.enumerate() if t.name.startswith(self._name)]
        while not self._end.wait(self._interval_s):
            frames = sys._current_frames()  # noqa: SLF001 - the documented way to other stacks
            for ident in watched:
                if ident is not None:
                    self._seen[_phase(frames.get(ident))] += 1
