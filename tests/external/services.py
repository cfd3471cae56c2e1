"""Fake services that others wrote, as subprocesses on the loopback interface."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

START = 30.0
"""Seconds that a service may take to begin."""


def command(variable: str, what: str) -> str:
    """The program that the environment names, for a fake that needs its own environment.

    Skips the test where there is none.
    """
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} does not name {what}: see noxfile.py")
    path = shutil.which(found)
    assert path is not None, f"{variable}={found} is no program"
    return path


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


@contextmanager
def served(arguments: Sequence[str], url: str, log: Path) -> Iterator[str]:
    """The service that these arguments start, once it answers at ``url``."""
    with started(arguments, f"{url}/health", log):
        yield url


@contextmanager
def started(
    arguments: Sequence[str], ready: str, log: Path, seconds: float = START
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of these arguments, once ``ready`` answers other than "not yet" (503)."""
    with (
        log.open("wb") as output,
        subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            _wait(process, ready, log, seconds)
            yield process
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except urllib.error.HTTPError as error:
            if error.code != 503:
                return
            time.sleep(0.05)
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"{process.args!r} did not begin:\n{log.read_text()[-2000:]}")
