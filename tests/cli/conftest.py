"""The real command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# A backend for --model that needs no model. It can send its own process a signal at the start
# of a request, which is a moment that tests cannot hit from outside.
BACKEND = """
import asyncio, os, signal
from asyncsgl.testing import ScriptedBackend

NUMBER = int(os.environ.get("TEST_SIGNAL_AT", 0))

async def answer(request):
    if len(backend.requests) == NUMBER:
        os.kill(os.getpid(), signal.Signals[os.environ["TEST_SIGNAL"]])
        await asyncio.sleep(3600)
    return "Paris."

backend = ScriptedBackend(answer)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """Runs ``asyncsgl`` in ``folder``."""

    folder: Path

    def __call__(
        self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "asyncsgl", *arguments],
            cwd=self.folder,
            input=stdin.encode(),
            capture_output=True,
            env={**os.environ, "COLUMNS": "200", **(env or {})},
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def batch(self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None) -> Done:
        """``asyncsgl batch … --model backend.py:backend``."""
        model = ("--model", "backend.py:backend")
        return self("batch", *arguments, *model, stdin=stdin, env=env)

    def write(self, name: str, *lines: object) -> None:
        """Write a file; what is no text becomes JSON."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.folder / name).write_text("".join(text + "\n" for text in texts))

    def results(self, name: str = "in.out.jsonl") -> list[dict[str, Any]]:
        """The lines of a result file."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    (tmp_path / "backend.py").write_text(BACKEND)
    return Command(tmp_path)
