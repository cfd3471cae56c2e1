"""A contestant's process, seen from outside: start it, send it lines, end it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Failure", "Process", "Team", "started"]

_ROOT = Path(__file__).parents[2]
_LINE_LIMIT_S = 900.0


class Failure(Exception):
    """A contestant could not be started, or a run of it failed."""


@dataclass(frozen=True)
class Team:
    """How to start a contestant.

    Args:
        name: of the engine, for the tables.
        module: its script in `benchmarks.peers`.
        python: the interpreter that has its packages.
        model: what it loads.
    """

    name: str
    module: str
    python: Path
    model: str


class Process:
    """A contestant's process and its lines."""

    def __init__(self, team: Team, dtype: str, threads: int, log: Path) -> None:
        self.team = team
        self._log = log.open("w", encoding="utf-8")
        command = [str(team.python), "-m", f"benchmarks.peers.{team.module}"]
        command += ["--model", team.model, "--dtype", dtype, "--threads", str(threads)]
        settings = {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "engine")]),
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | settings,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")  # its end

    def answer(self) -> dict[str, Any]:
        """The next line.

        Raises:
            Failure: it says so, it has ended, or it takes too long.
        """
        try:
            line = self._lines.get(timeout=_LINE_LIMIT_S)
        except queue.Empty:
            raise Failure(f"no answer within {_LINE_LIMIT_S:.0f} s") from None
        if not line:
            raise Failure(f"its process ended; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def run(self, workload: str, repetition: int, profile: bool = False) -> dict[str, Any]:
        """Have it run a workload.

        Raises:
            Failure: it did not.
        """
        command = {"workload": workload, "repetition": repetition, "profile": profile}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Failure(f"its process ended; see {self._log.name}") from error
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.join(5)  # a child of it may hold its output
        self._log.close()


@contextmanager
def started(
    team: Team, dtype: str, threads: int, logs: Path
) -> Iterator[tuple[Process | None, str]]:
    """A loaded worker and its version, or None and what went wrong."""
    worker = Process(team, dtype, threads, logs / f"{team.name}-{dtype}.log")
    try:
        try:
            version = str(worker.answer()["version"])
        except Failure as failure:
            yield None, str(failure)
        else:
            yield worker, version
    finally:
        worker.close()
