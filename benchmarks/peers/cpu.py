"""How much CPU processes that are not part of a measurement took during it (Linux)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["ForeignCpu", "wait_for_quiet"]

_PROC = Path("/proc")
_IDLE, _IOWAIT, _STEAL = 3, 4, 7


def _busy_ticks() -> int | None:
    """Ticks that all cores together were busy; None where that cannot be told."""
    try:
        first = (_PROC / "stat").read_text().splitlines()[0]
    except OSError:
        return None
    ticks = [int(word) for word in first.split()[1 : _STEAL + 2]]
    return sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT]


def _process(folder: Path) -> tuple[int, int] | None:
    """Parent and ticks of a process, its ended children's included."""
    try:
        words = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None  # it has ended
    return int(words[1]), sum(int(word) for word in words[11:15])


def _tree_ticks(roots: frozenset[int]) -> int:
    """Ticks of processes and everything below them."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and (found := _process(folder)) is not None:
            parents[int(folder.name)], ticks[int(folder.name)] = found

    def ours(process: int) -> bool:
        while process not in roots:
            process = parents.get(process, 0)
            if process <= 1:
                return False
        return True

    return sum(count for process, count in ticks.items() if ours(process))


class ForeignCpu:
    """`with ForeignCpu(pids) as watch: ...`, then `watch.cpus`.

    Args:
        pids: roots of the process trees that belong to the measurement, besides this one.
    """

    cpus: float | None = None
    """CPU seconds per second that others used; None where that cannot be told."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._roots = frozenset((os.getpid(), *pids))

    def __enter__(self) -> Self:
        self._busy = _busy_ticks()
        self._own = _tree_ticks(self._roots) if self._busy is not None else 0
        self._begun = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        wall = time.perf_counter() - self._begun
        busy = _busy_ticks()
        if self._busy is None or busy is None or wall <= 0.0:
            return
        foreign = busy - self._busy - (_tree_ticks(self._roots) - self._own)
        self.cpus = max(0.0, foreign / os.sysconf("SC_CLK_TCK")) / wall


def wait_for_quiet(limit_s: float, pids: Iterable[int] = (), most: float = 0.06) -> bool:
    """Wait until others use less than `most` CPUs for two half seconds in a row.

    Returns:
        Whether that came within the limit.
    """
    end = time.monotonic() + limit_s
    calm = 0
    while calm < 2:
        if time.monotonic() >= end:
            return False
        with ForeignCpu(pids) as watch:
            time.sleep(0.5)
        if watch.cpus is None:
            return True
        calm = calm + 1 if watch.cpus < most else 0
    return True
