"""Hooks into running programs: what started, what came first, what finished, what failed.

An instrument makes one listener for each run; the listener takes the run's events
(:mod:`asyncsgl.program.events`). With no instrument installed no event is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .program.events import Listener

__all__ = ["Instrument", "add_instrument", "instrumented", "remove_instrument"]


class Instrument(Protocol):
    """Makes the listener of each run."""

    def listen(self, program: str, run_id: str) -> Listener | None:
        """The listener for a run of ``program``; None to leave this run alone."""


_installed: list[Instrument] = []


def add_instrument(instrument: Instrument) -> None:
    """Watch every run that starts from now on, in the whole process."""
    _installed.append(instrument)


def remove_instrument(instrument: Instrument) -> None:
    """Watch no further runs; no effect on an instrument that is not installed."""
    if instrument in _installed:
        _installed.remove(instrument)


@contextmanager
def instrumented(instrument: Instrument) -> Iterator[Instrument]:
    """Watch the runs that start while the ``with`` block runs."""
    add_instrument(instrument)
    try:
        yield instrument
    finally:
        remove_instrument(instrument)


def listeners_for(program: str, run_id: str) -> tuple[Listener, ...]:
    """The listeners of the installed instruments for one run."""
    if not _installed:
        return ()
    made = (instrument.listen(program, run_id) for instrument in _installed)
    return tuple(listener for listener in made if listener is not None)
