"""Grammars of the sequences in a batch: compiled, followed, and turned into masks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from .errors import Closed, EngineError, InvalidRequest
from .plan import Mask
from .request import Grammar

if TYPE_CHECKING:
    from .grammar import CompiledGrammar, GrammarCompiler, GrammarState

__all__ = ["Constraints", "Follower", "Masking"]

_STACK = 512 << 20
"""Bytes of the compiling thread's stack, of which only what is used takes memory. The library
recurses along chains of rules, and where the stack ends the process does: with the usual 8 MiB
a schema of 75 KB could do that. The longest chain that `GrammarCompiler.MOST` lets through used
less than a half of this."""


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
    """Compiles grammars on one thread, and makes masks on another while the forward pass runs.

    Args:
        make_compiler: called on the compiling thread when the first grammar comes.
    """

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._make = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="asyncsgl-masks")
        self._compiling: ThreadPoolExecutor | None = None
        self._under_way: dict[Grammar, Future[CompiledGrammar]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def compiled(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """A grammar, compiled or about to be; once for all who ask meanwhile. Any thread may ask.

        The future has InvalidRequest where the grammar is malformed or uses what is not
        supported, and ConfigError where this model's tokenizer cannot follow grammars.

        Raises:
            Closed: the threads were ended.
        """
        with self._lock:
            if self._closed:
                raise Closed("the engine is shut down; make a new one")
            if self._compiler is not None and (found := self._compiler.find(grammar)) is not None:
                done: Future[CompiledGrammar] = Future()
                done.set_result(found)
                return done
            future = self._under_way.get(grammar)
            if future is not None:
                return future
            if self._compiling is None:
                self._compiling = _deep_worker()
            future = self._under_way[grammar] = self._compiling.submit(self._compile, grammar)
        future.add_done_callback(lambda _: self._under_way.pop(grammar, None))
        return future

    def follow(self, grammar: Grammar) -> Follower:
        """A place at the start of a grammar; waits for it where it is not compiled yet.

        Raises:
            InvalidRequest: the grammar is malformed or uses what is not supported.
            ConfigError: this model's tokenizer cannot follow grammars.
        """
        return Follower(self.compiled(grammar).result().new_state())

    def begin(self, rows: Sequence[int], followers: Sequence[Follower]) -> Masking:
        """Start to fill the masks of some rows."""
        if not rows or self._compiler is None:
            return Masking(None)
        states = [follower.state for follower in followers]
        return Masking(self._masks.submit(_fill, self._compiler, rows, states))

    def close(self) -> None:
        """End the threads, after what they are at."""
        with self._lock:
            self._closed = True
        self._masks.shutdown()
        if self._compiling is not None:
            self._compiling.shutdown(cancel_futures=True)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            if self._compiler is None:
                self._compiler = self._make()
            return self._compiler.compile(grammar)
        except EngineError:
            raise
        except BaseException as error:  # a panic in the library is no Exception
            raise InvalidRequest(
                "grammar", f"{grammar.kind}: cannot be compiled ({type(error).__name__}: {error})"
            ) from error


def _deep_worker() -> ThreadPoolExecutor:
    """One thread with a deep stack."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="asyncsgl-grammars")
    usual = threading.stack_size(_STACK)
    try:
        worker.submit(int).result()  # the thread starts with its first work
    finally:
        threading.stack_size(usual)
    return worker


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
