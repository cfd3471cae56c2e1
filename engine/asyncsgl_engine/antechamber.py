"""Requests that wait until their grammar is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from .constraints import Compilation, Constraints, Follower
from .errors import EngineError
from .request import Grammar, Request

__all__ = ["Antechamber", "Guest"]


@dataclass(frozen=True, slots=True, eq=False)
class Guest:
    """A request that would run but for its grammar.

    Args:
        request: what was asked for.
        patterns: its `stop_regex`, compiled.
        arrived: when it came, in seconds of the core's clock.
    """

    request: Request
    patterns: Sequence[regex.Pattern[str]]
    arrived: float


class _Group:
    """Those who wait for the same grammar, in the order in which they came."""

    __slots__ = ("compilation", "guests")

    def __init__(self, compilation: Compilation) -> None:
        self.compilation = compilation
        self.guests: dict[str, Guest] = {}


class Antechamber:
    """Holds requests back while their grammars are compiled elsewhere, each grammar once.

    Args:
        constraints: compiles them.
    """

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._groups: dict[Grammar, _Group] = {}
        self._grammars: dict[str, Grammar] = {}

    def __len__(self) -> int:
        return len(self._grammars)

    def __contains__(self, name: str) -> bool:
        return name in self._grammars

    @property
    def ready(self) -> bool:
        """Whether somebody may leave."""
        return self._constraints.compiled

    def receive(self, guest: Guest, grammar: Grammar) -> None:
        """Take a request in; one whose grammar is known already may leave at once."""
        group = self._groups.get(grammar)
        if group is None:
            group = self._groups[grammar] = _Group(self._constraints.compile(grammar))
        name = guest.request.request_id
        group.guests[name] = guest
        self._grammars[name] = grammar

    def leaving(self) -> list[tuple[Guest, Follower | EngineError]]:
        """Let those go whose grammars are done, with what came of it."""
        found: list[tuple[Guest, Follower | EngineError]] = []
        for compilation in self._constraints.take_compiled():
            group = self._groups.get(compilation.grammar)
            if group is None or group.compilation is not compilation:
                continue  # nobody wants it any more
            for name, guest in list(group.guests.items()):
                try:
                    found.append((guest, compilation.follow()))
                except EngineError as error:
                    found.append((guest, error))
                self.dismiss(name)
        return found

    def dismiss(self, name: str) -> Guest | None:
        """Let go of a request, whatever becomes of its grammar; None if it is not here."""
        grammar = self._grammars.pop(name, None)
        if grammar is None:
            return None
        group = self._groups[grammar]
        guest = group.guests.pop(name)
        if not group.guests:
            del self._groups[grammar]
            group.compilation.give_up()
        return guest

    def dismiss_all(self) -> list[Guest]:
        """Let go of everyone."""
        return [guest for name in list(self._grammars) if (guest := self.dismiss(name))]
