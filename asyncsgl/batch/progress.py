"""Shows on standard error how a batch goes: live on a terminal, as occasional lines elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from .tally import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from ..types import Usage

__all__ = ["Display", "console_for", "show"]

_LINE_SECONDS = 5.0


class Display(ABC):
    """What the one who runs a batch sees of it. Its methods are called as things happen."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    @abstractmethod
    def stage(self, what: str, fraction: float | None = None) -> None:
        """Something that comes before the rows goes on, such as loading a model.

        Args:
            what: in a few words.
            fraction: how much of it is done, 0 to 1, where that is known.

        May be called from any thread.
        """

    @abstractmethod
    def rows_begin(self) -> None:
        """The rows begin; no more stages come."""

    @abstractmethod
    def changed(self) -> None:
        """The tally has changed."""

    @abstractmethod
    def close(self) -> None:
        """Leave the terminal as it was."""

    def row(self, usage: Usage, error: str | None = None, line: int = 0) -> None:
        """One row was answered, or failed with ``error``; ``line`` is its line in the input."""
        self.tally.add(usage, error, line)
        self.changed()

    def skip(self) -> None:
        """One row was answered before."""
        self.tally.skip()
        self.changed()


@contextmanager
def show(total: int | None = None, *, stream: TextIO | None = None) -> Iterator[Display]:
    """Show the progress of a batch.

    Args:
        total: rows of the input, if that is known.
        stream: where to; standard error by default. A terminal gets a live display.

    Returns:
        A context manager that gives the display, and clears it away in the end.
    """
    console = console_for(stream)
    tally = Tally(total)
    live = console.is_terminal and not console.is_dumb_terminal
    display = LiveDisplay(tally, console) if live else PlainDisplay(tally, stream or sys.stderr)
    try:
        yield display
    finally:
        display.close()


class LiveDisplay(Display):
    """A spinner for the stages, then a bar for the rows."""

    def __init__(self, tally: Tally, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
        )

        super().__init__(tally)
        self._console = console
        self._stages = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            console=console,
            transient=True,
        )
        self._rows = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TextColumn("{task.fields[words]}"),
            console=console,
            transient=True,
        )
        self._stage_task = self._stages.add_task("starting", total=None)
        self._rows_task = self._rows.add_task("", total=None, words="")
        self._stages.start()

    def stage(self, what: str, fraction: float | None = None) -> None:
        self._stages.update(
            self._stage_task,
            description=what,
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )

    def rows_begin(self) -> None:
        self._stages.stop()
        self.tally.begin()
        self._rows.update(self._rows_task, total=self.tally.total)
        self._rows.start()

    def changed(self) -> None:
        self._rows.update(
            self._rows_task, completed=self.tally.done, words=_words(self.tally, markup=True)
        )

    def close(self) -> None:
        self._stages.stop()
        self._rows.stop()
        self.tally.end()


class PlainDisplay(Display):
    """A line for each stage, and one for the rows every few seconds."""

    def __init__(self, tally: Tally, file: TextIO) -> None:
        super().__init__(tally)
        self._file = file
        self._stage = ""
        self._due = 0.0

    def stage(self, what: str, fraction: float | None = None) -> None:  # noqa: ARG002
        if what != self._stage:
            self._stage = what
            self._say(what)

    def rows_begin(self) -> None:
        self.tally.begin()
        self._due = time.monotonic() + _LINE_SECONDS

    def changed(self) -> None:
        now = time.monotonic()
        if self._due and now >= self._due:
            self._due = now + _LINE_SECONDS
            of = "" if self.tally.total is None else f"/{self.tally.total}"
            self._say(f"{self.tally.done}{of} rows {_words(self.tally)}")

    def close(self) -> None:
        self.tally.end()

    def _say(self, text: str) -> None:
        print(text, file=self._file, flush=True)


def _words(tally: Tally, *, markup: bool = False) -> str:
    """Failed rows, speed and time left."""
    failed = f"{tally.failed:,} failed"
    if markup and tally.failed:
        failed = f"[red]{failed}[/red]"
    words = [failed, f"{tally.tokens_per_second:,.0f} tokens/s"]
    if tally.seconds_left is not None:
        words.append(f"{_clock(tally.seconds_left)} left")
    return " · ".join(words)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def console_for(stream: TextIO | None) -> Console:
    """A console on ``stream``, or on standard error."""
    from rich.console import Console

    return Console(file=stream or sys.stderr, soft_wrap=True)
