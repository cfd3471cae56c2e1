"""Locks of open files."""

from __future__ import annotations

from typing import BinaryIO

from ..errors import BatchError

__all__ = ["lock"]


def lock(file: BinaryIO, *, wait: bool = False) -> None:
    """Keep other processes off a file until it is closed.

    Args:
        file: an open file.
        wait: for whoever has it locked.

    Raises:
        BlockingIOError: another process has it locked, and this was not to wait.
        OSError: the file cannot be locked.
        BatchError: this system cannot lock files so.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise BatchError(
            "a batch locks its output file and replaces it while it is open, which Windows does "
            "not do: run it in WSL, or use run_batch, which writes no file"
        ) from error
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
