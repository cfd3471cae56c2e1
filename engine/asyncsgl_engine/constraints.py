"""Grammars of the sequences in a batch: compiled, followed, and turned into masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from .errors import EngineError
from .plan import Mask
from .request import Grammar

if TYPE_CHECKING:
    from .grammar import GrammarCompiler, GrammarState

__all__ = ["Constraints", "Follower", "Masking"]


class Follower:
    """One sequence's place in its grammar.

    Args:
        state: the grammar library's.
    """

    __slots__ = ("state",)

    def __init__(self, state: GrammarState) -> None:
        self.state = state

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token can follow."""
        return self.state.is_finished

    def accept(self, token: int) -> None:
        """Go on by a token."""
        self.state.accept(token)

    def forced(self) -> list[int]:
        """Tokens that must come next, if there is no choice about them."""
        return self.state.forced_tokens()


class Masking:
    """The masks of one step in the making.

    Args:
        future: gives the mask and the faults, by row of the plan.
    """

    __slots__ = ("_future",)

    def __init__(self, future: Future[tuple[Mask, dict[int, EngineError]]] | None) -> None:
        self._future = future

    def result(self) -> Mask | None:
        """Wait for the mask; None where no row has a grammar."""
        return None if self._future is None else self._future.result()[0]

    def check(self, row: int) -> None:
        """Raise what went wrong with a row's grammar, if anything did."""
        if self._future is not None and row in (failed := self._future.result()[1]):
            raise failed[row]


class Constraints:
    """Makes masks on a thread of its own, while the forward pass runs.

    Args:
        make_compiler: called when the first grammar comes.
    """

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._make = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="asyncsgl-masks")

    def follow(self, grammar: Grammar) -> Follower:
        """A place at the start of a grammar, which is compiled once for all who use it.

        Raises:
            InvalidRequest: the grammar is malformed or uses what is not supported.
            ConfigError: this model's tokenizer cannot follow grammars.
        """
        if self._compiler is None:
            self._compiler = self._make()
        return Follower(self._compiler.compile(grammar).new_state())

    def begin(self, rows: Sequence[int], followers: Sequence[Follower]) -> Masking:
        """Start to fill the masks of some rows."""
        if not rows or self._compiler is None:
            return Masking(None)
        states = [follower.state for follower in followers]
        return Masking(self._worker.submit(_fill, self._compiler, rows, states))

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()


def _fill(
    compiler: GrammarCompiler, rows: Sequence[int], states: Sequence[GrammarState]
) -> tuple[Mask, dict[int, EngineError]]:
    bits = compiler.allocate(len(states))
    failed: dict[int, EngineError] = {}
    try:
        compiler.fill_masks(states, bits)
    except EngineError:
        for line, state in enumerate(states):
            try:
                state.check()
            except EngineError as error:
                failed[rows[line]] = error
                bits[line] = -1
    return Mask(rows, bits), failed
