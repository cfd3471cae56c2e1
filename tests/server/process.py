"""A server in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

SMALL = ("--max-total-tokens", "8192", "--num-threads", "1", "--dtype", "float32")
"""Flags that keep a server to one core and little memory."""


class ServerProcess:
    """A server process that is ready."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self.url = self._ready()

    @property
    def stderr(self) -> IO[str]:
        assert self.process.stderr is not None
        return self.process.stderr

    def _ready(self) -> str:
        for line in self.stderr:
            self.lines.append(line)
            found = re.fullmatch(r"asyncsgl: ready on (http://\S+) with \S+\n", line)
            if found is not None:
                return found[1]
        raise AssertionError("".join(self.lines))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """Wait for the end."""
        self.lines += self.stderr.readlines()
        return self.process.wait(30)

    def resident(self) -> float:
        """MiB of memory that it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
