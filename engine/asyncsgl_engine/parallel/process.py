"""The process of one rank: started, listened to, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from ..errors import RankFailed
from .wire import Kind, receive

__all__ = ["FAREWELL_S", "RankProcess"]

FAREWELL_S = 5.0
"""Seconds that a process gets to end by itself."""

_TAIL = 2000
_PACKAGE = Path(__file__).parents[2]


@dataclass(slots=True)
class RankProcess:
    """One rank's process, the socket to it, and what it wrote.

    Args:
        number: its rank.
        process: running, or ended.
        sock: this side of the pair.
        log: its standard output and error.
    """

    number: int
    process: subprocess.Popen[bytes]
    sock: socket.socket
    log: IO[bytes]

    @classmethod
    def start(cls, number: int, threads: int) -> Self:
        """Start a rank, in a session of its own: the terminal's Ctrl-C is not for it.

        Raises:
            OSError: it cannot be started.
        """
        mine, its = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter
                _command(its.fileno()),
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(threads),
            )
        except BaseException:
            mine.close()
            log.close()
            raise
        finally:
            its.close()
        return cls(number, process, mine, log)

    def listen(self) -> tuple[Kind, bytes]:
        """The next frame it sends.

        Raises:
            RankFailed: it failed, or is gone.
        """
        try:
            frame = receive(self.sock)
        except OSError:
            frame = None
        if frame is None:
            raise RankFailed(f"{self._title} {self._ending()}")
        kind, body = frame
        if kind is Kind.FAILED:
            raise RankFailed(f"{self._title} failed: {body.decode(errors='replace')}")
        return frame

    def fault(self) -> RankFailed:
        """Why it speaks, or is silent for ever: while steps run it has nothing else to say."""
        try:
            kind, _ = self.listen()
        except RankFailed as fault:
            return fault
        return RankFailed(f"{self._title} sent {kind.name} out of turn")

    def end(self, wait_s: float) -> None:
        """Wait until it has ended, and kill it if that takes longer than `wait_s` seconds."""
        try:
            self.process.wait(max(0.0, wait_s))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    @property
    def _title(self) -> str:
        return f"tensor-parallel rank {self.number} (process {self.process.pid})"

    def _ending(self) -> str:
        """How it ended, in words."""
        try:
            status = self.process.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            return "closed its connection but runs on"
        if status < 0:
            return f"was killed by signal {-status} ({signal.Signals(-status).name})"
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - _TAIL))
        tail = self.log.read().decode(errors="replace").strip()
        return f"ended with status {status}" + (f": {tail}" if tail else "")


def _command(descriptor: int) -> Sequence[str]:
    return [
        *(sys.executable, "-P", "-m", "asyncsgl_engine.parallel.worker"),
        *(str(descriptor), str(os.getpid())),
    ]


def _environment(threads: int) -> dict[str, str]:
    folders = [str(_PACKAGE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder),
        "OMP_NUM_THREADS": str(threads),
    }
