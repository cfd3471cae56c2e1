"""Rank 0's hold on the other ranks: starts them, leads their steps, notices their end."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

import torch

from ..config import ResolvedConfig
from ..errors import RankFailed
from ..plan import Plan
from .group import Group
from .process import FAREWELL_S, RankProcess
from .wire import Kind, pack_plan, send, send_json

__all__ = ["Ranks", "Setup"]

_LOADING_S = 3600.0
_GATHER_S = 0.2


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank must know to load its part of the model.

    Args:
        path: the model's folder.
        dtype: of the parameters.
        device: `cpu` or `cuda`.
        size: how many ranks there are.
        threads: that each computes with.
        limit_s: seconds that a step may take.
        meeting: the file by which they find each other.
    """

    path: str
    dtype: str
    device: str
    size: int
    threads: int
    limit_s: float
    meeting: str


class Ranks:
    """The processes of ranks 1 and above. They end with this process, however it ends.

    All methods but `watch`'s callback are the engine's thread's.

    Args:
        size: ranks, this process's included.
        threads: that each computes with.
        limit_s: seconds that a step may take.
    """

    def __init__(self, size: int, threads: int, limit_s: float) -> None:
        self._limit_s = limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="asyncsgl-ranks-")
        self._others: list[RankProcess] = []
        self._device = torch.device("cpu")
        self._group: Group | None = None
        self._fault: RankFailed | None = None
        self._begun: float | None = None
        self._monitor: threading.Thread | None = None
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._threads = torch.get_num_threads()  # the whole process's, which is the user's
        torch.set_num_threads(threads)
        try:
            for number in range(1, size):
                self._others.append(RankProcess.start(number, threads))
        except BaseException:
            self.close()
            raise

    # -- starting -----------------------------------------------------------------------------

    def connect(self, setup: Setup, device: torch.device) -> Group:
        """Tell the ranks what to load, and meet them.

        Raises:
            RankFailed: one of them could not.
        """
        self._hear(Kind.HELLO)
        self._device = device
        with self.following():
            for rank in self._others:
                send_json(rank.sock, Kind.SETUP, {"rank": rank.number, **asdict(setup)})
            self._group = Group.connect(Path(setup.meeting), 0, setup.size, device, setup.limit_s)
        return self._group

    @property
    def meeting(self) -> Path:
        """A file for `Group.connect`, in a folder of this user's alone."""
        return Path(self._folder.name) / "meeting"

    def loaded(self) -> int:
        """Wait for the ranks' parts of the model; the least free memory on any device, in bytes.

        Raises:
            RankFailed: one could not load its part.
        """
        return min(int(answer["free_bytes"]) for answer in self._hear(Kind.READY))

    def configure(self, config: ResolvedConfig) -> None:
        """Let the ranks make their caches and try their parts of the model out.

        They do that together: this process must make its own `ModelRunner` next.
        """
        with self.following():
            for rank in self._others:
                send_json(rank.sock, Kind.CONFIG, asdict(config))

    def watch(self, on_fault: Callable[[RankFailed], None]) -> None:
        """Wait until the ranks are ready for plans; from then on notice their end.

        Args:
            on_fault: called once, on another thread, when one has ended or hangs.

        Raises:
            RankFailed: one failed before.
        """
        self._hear(Kind.READY)
        self._monitor = threading.Thread(
            target=self._watch, args=(on_fault,), name="asyncsgl-ranks", daemon=True
        )
        self._monitor.start()

    def _hear(self, kind: Kind) -> list[Mapping[str, float]]:
        """One answer of each rank; the first failure of any ends the waiting."""
        answers: list[Mapping[str, float]] = []
        deadline = time.monotonic() + _LOADING_S
        with DefaultSelector() as selector:
            for rank in self._others:
                selector.register(rank.sock, EVENT_READ, rank)
            while len(answers) < len(self._others):
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    raise RankFailed(f"the ranks were not ready in {_LOADING_S:g} seconds")
                for key, _ in ready:
                    heard, body = key.data.listen()
                    assert heard is kind, f"expected {kind.name}, heard {heard.name}"
                    answers.append(json.loads(body or b"{}"))
                    selector.unregister(key.fileobj)
        return answers

    # -- steps --------------------------------------------------------------------------------

    @contextmanager
    def lead(self, plan: Plan) -> Iterator[None]:
        """Have the ranks compute a plan, while the block computes it here.

        Raises:
            RankFailed: one of them failed, or this process did, after which they are out of
                step; the engine cannot go on.
        """
        with self.following():
            body = pack_plan(plan)
            self._begun = time.monotonic()
            for rank in self._others:
                send(rank.sock, Kind.PLAN, body)
            yield
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # so that `_begun` times the step
            self._begun = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Raise what goes wrong in the block as the fault of the rank that it comes from."""
        if self._fault is not None:
            raise self._fault
        try:
            yield
        except Exception as error:
            raise self._explained(error) from error
        if self._fault is not None:
            raise self._fault

    def _explained(self, error: Exception) -> RankFailed:
        if self._monitor is not None:
            self._monitor.join(FAREWELL_S)  # it sees the end of a rank about when we do
            if self._fault is not None:
                return self._fault
        for rank in self._others:
            if rank.process.poll() is not None:
                return rank.fault()
        return RankFailed(
            f"the ranks are out of step: rank 0 failed ({type(error).__name__}: {error})"
        )

    def _watch(self, on_fault: Callable[[RankFailed], None]) -> None:
        """Until `close`, or the first fault, which it makes known before anything fails of it."""
        with DefaultSelector() as selector:
            selector.register(self._woken, EVENT_READ)
            for rank in self._others:
                selector.register(rank.sock, EVENT_READ, rank)
            fault: RankFailed | None = None
            while fault is None:
                ready = selector.select(min(1.0, self._limit_s / 4))
                if any(key.data is None for key, _ in ready):
                    return
                if ready:
                    fault = self._first_fault(selector)
                elif self._hangs():
                    fault = RankFailed(
                        f"a step of the tensor-parallel ranks took longer than {self._limit_s:g} "
                        "seconds (watchdog_timeout): one of them hangs"
                    )
        self._fault = fault
        on_fault(fault)
        for rank in self._others:
            rank.process.kill()
        if self._group is not None:
            self._group.abort()

    def _hangs(self) -> bool:
        begun = self._begun
        return begun is not None and time.monotonic() - begun > self._limit_s

    def _first_fault(self, selector: DefaultSelector) -> RankFailed:
        """Why a rank ended, rather than how the others took it, which fail a moment later."""
        found: list[RankProcess] = []
        while ready := selector.select(_GATHER_S):
            for key, _ in ready:
                selector.unregister(key.fileobj)
                if key.data is not None:
                    found.append(key.data)
        faults = [rank.fault() for rank in found]
        gone = [
            fault
            for rank, fault in zip(found, faults, strict=True)
            if (rank.process.poll() or 0) < 0
        ]
        return (gone or faults)[0]

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """End the processes and wait for that, some seconds at most. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._wake.close()
        if self._monitor is not None:
            self._monitor.join()
        for rank in self._others:
            rank.sock.close()  # which it takes for its end
        deadline = time.monotonic() + FAREWELL_S
        for rank in self._others:
            rank.end(deadline - time.monotonic())
        self._woken.close()
        torch.set_num_threads(self._threads)
        self._group = None
        self._folder.cleanup()
