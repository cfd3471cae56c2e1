"""What event loops leave for the engine's thread to find between two steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from .request import Request

__all__ = ["Inbox", "Patient"]


class Inbox:
    """What came in since the last step."""

    __slots__ = ("aborted", "calls", "left", "new")

    def __init__(self) -> None:
        self.new: dict[str, Request] = {}
        self.left: set[str] = set()
        self.aborted: set[str] = set()
        self.calls: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self.new or self.left or self.aborted or self.calls)

    def hold_new(self, earlier: Inbox) -> None:
        """Keep the requests that came in an earlier inbox, and what was said of them since."""
        self.new, earlier.new = earlier.new, {}
        self.aborted = earlier.aborted & self.new.keys()
        earlier.aborted -= self.aborted


class Patient(NamedTuple):
    """A call that waits until nothing runs."""

    done: Future[Any]
    call: Callable[[], None]
