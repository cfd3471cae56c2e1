"""Helper processes: run one, hand on its output line by line, never leave it behind."""

from __future__ import annotations

import subprocess
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["ChildResult", "run_child"]

_TAIL_LINES = 30


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a helper process ended.

    Args:
        status: its exit status, negative for the signal that killed it.
        tail: the last lines it wrote that nobody claimed, oldest first.
    """

    status: int
    tail: tuple[str, ...]

    @property
    def disk_full(self) -> bool:
        """Whether it said that there was no room left on the disk."""
        return any(
            "No space left on device" in line or "Disk quota exceeded" in line for line in self.tail
        )

    @property
    def ending(self) -> str:
        """Its end in words."""
        if self.status < 0:
            return f"was killed by signal {-self.status}"
        return f"ended with status {self.status}"


def run_child(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    claim: Callable[[str], bool],
) -> ChildResult:
    """Run a command to its end. Its input is empty, and ends when this process does.

    Args:
        command: program and arguments.
        cwd: the folder it runs in.
        environment: all of its environment variables.
        claim: called with each line it writes to stdout or stderr; true when the line was
            understood and need not be kept.

    Raises:
        OSError: the program cannot be started.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(  # noqa: S603 - our own interpreter, arguments are not a shell's
        command,
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                line = raw.strip()
                if line and not claim(line):
                    tail.append(line)
        except BaseException:
            process.kill()
            raise
    return ChildResult(process.returncode, tuple(tail))
