"""Grammars of the sequences in a batch: compiled, followed, and turned into masks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

from .errors import EngineError, InvalidRequest
from .plan import Mask
from .request import Grammar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .grammar import CompiledGrammar, GrammarCompiler, GrammarState

__all__ = ["Compilation", "Constraints", "Follower", "Masking"]

_COMPILERS = 2
_STACK_BYTES = 512 << 20
"""Of a thread that compiles: rules that refer to one another are followed by recursion in native
code, whose overflow would end the process: with the usual 8 MiB a schema of 75 KB could do that.
The longest chain that `GrammarCompiler.MOST` lets through used less than a half of this. Only what
is used takes memory."""


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


class Compilation:
    """A grammar on its way to being followed.

    Args:
        grammar: what is compiled.
        future: gives it compiled.
    """

    __slots__ = ("_future", "grammar")

    def __init__(self, grammar: Grammar, future: Future[CompiledGrammar]) -> None:
        self.grammar = grammar
        self._future = future

    def follow(self) -> Follower:
        """A place at the start of the grammar; asked for once it is compiled.

        Raises:
            InvalidRequest: the grammar is malformed, too large, or uses what is not supported.
            ConfigError: this model's tokenizer cannot follow grammars.
        """
        return Follower(self._future.result().new_state())

    def give_up(self) -> None:
        """Do not begin it, if it was not begun."""
        self._future.cancel()


class Constraints:
    """Compiles grammars and makes masks, each on threads of their own.

    Owned by the thread that steps. Compiling takes anything from a millisecond to seconds, so
    it never waits for that; masks are made while the forward pass runs.

    Args:
        make_compiler: called when the first grammar comes, on a thread that compiles.
    """

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._make = make_compiler
        self._making = threading.Lock()
        self._compiler: GrammarCompiler | None = None
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="asyncsgl-masks")
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="asyncsgl-grammars")
        self._done: SimpleQueue[Compilation] = SimpleQueue()
        self._wake: Callable[[], None] = _nobody

    def when_compiled(self, wake: Callable[[], None]) -> None:
        """Have something called each time that a compilation is done, on the thread it ran on."""
        self._wake = wake

    @property
    def compiled(self) -> bool:
        """Whether a compilation is done that was not taken yet."""
        return not self._done.empty()

    def take_compiled(self) -> list[Compilation]:
        """Compilations that are done, each once, well or not."""
        return [self._done.get_nowait() for _ in range(self._done.qsize())]

    def compile(self, grammar: Grammar) -> Compilation:
        """Begin to compile a grammar; what was compiled lately is done at once."""
        if self._compiler is not None and (found := self._compiler.find(grammar)):
            known: Future[CompiledGrammar] = Future()
            known.set_result(found)
            compilation = Compilation(grammar, known)
            self._done.put(compilation)
            return compilation
        with _deep_stacks():
            future = self._compilers.submit(self._compile, grammar)
        compilation = Compilation(grammar, future)
        future.add_done_callback(lambda _: self._tell(compilation))
        return compilation

    def begin(self, rows: Sequence[int], followers: Sequence[Follower]) -> Masking:
        """Start to fill the masks of some rows."""
        if not rows or self._compiler is None:
            return Masking(None)
        states = [follower.state for follower in followers]
        return Masking(self._masks.submit(_fill, self._compiler, rows, states))

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._compilers.shutdown(cancel_futures=True)
        self._masks.shutdown()

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            with self._making:
                if self._compiler is None:
                    self._compiler = self._make()
            return self._compiler.compile(grammar)
        except EngineError:
            raise
        except BaseException as error:  # a panic in the library is no Exception
            raise InvalidRequest(
                "grammar", f"{grammar.kind}: cannot be compiled ({type(error).__name__}: {error})"
            ) from error

    def _tell(self, compilation: Compilation) -> None:
        self._done.put(compilation)
        self._wake()


def _nobody() -> None:
    pass


@contextmanager
def _deep_stacks() -> Iterator[None]:
    """Threads that are started meanwhile get a deep stack."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


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
