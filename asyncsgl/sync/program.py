"""Programs for callers that block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, overload

from ..backends.base import Backend
from ..program.program import Program
from ..program.result import State
from .door import ThreadDoor
from .portal import PORTAL, Portal
from .stream import StreamingState

if TYPE_CHECKING:
    from ..program.tracer import Traced

__all__ = ["BlockingProgram", "function"]

_END = object()


class BlockingProgram:
    """A program whose ``run`` blocks; what ``asyncsgl.sync.function`` makes.

    Plain ``def`` bodies run in a thread of their own, where reading ``s["x"]`` waits for the
    text. ``async def`` bodies run on the background event loop and await as usual.

    Args:
        program: the program, or the function to make one of.
        portal: where it runs.
    """

    def __init__(self, program: Program, portal: Portal) -> None:
        functools.update_wrapper(self, program.body)
        self.program = program.with_plain_door(ThreadDoor)
        self._portal = portal

    @property
    def name(self) -> str:
        """The function's name."""
        return self.program.name

    def bind(self, **arguments: object) -> BlockingProgram:
        """This program with some of its arguments fixed; see :meth:`Program.bind`."""
        return BlockingProgram(self.program.bind(**arguments), self._portal)

    def run(
        self,
        *args: Any,
        backend: Backend | None = None,
        stream: bool = False,
        **arguments_and_sampling: Any,
    ) -> Any:
        """Run the program and wait for its end; see :meth:`Program.run`.

        Args:
            *args: the program's arguments, by position.
            backend: where to run; the default backend unless given.
            stream: return at once, with a state whose text can be read while it is written.
            **arguments_and_sampling: arguments, and sampling fields as defaults.

        Returns:
            the finished :class:`~asyncsgl.State`, or a :class:`StreamingState`.
        """
        call = self.program.call(args, arguments_and_sampling, backend)
        if stream:
            return StreamingState(self._portal, call)
        return self._portal.call(call.run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as :meth:`run`."""
        return self.run(*args, **kwargs)

    def run_batch(
        self,
        batch_kwargs: Iterable[Mapping[str, object]],
        *,
        num_threads: int | Literal["auto"] = "auto",
        progress_bar: bool = False,
        backend: Backend | None = None,
        generator_style: bool = False,
        return_exceptions: bool = False,
        **sampling: Any,
    ) -> Any:
        """Run the program for every row; see :meth:`Program.run_batch`.

        Args:
            batch_kwargs: the arguments of each run.
            num_threads: how many runs at once; "auto" asks the backend.
            progress_bar: show a bar on the terminal.
            backend: where to run; the default backend unless given.
            generator_style: give a generator of the states, in order, each as soon as it
                and those before it are done. A failed row raises its error there.
            return_exceptions: a failed row's exception stands in its place.
            **sampling: defaults for every generation.
        """
        if generator_style:
            return self._generate(batch_kwargs, num_threads, backend, sampling, return_exceptions)
        return self._portal.call(
            functools.partial(
                self.program.run_batch,
                batch_kwargs,
                num_threads=num_threads,
                progress_bar=progress_bar,
                backend=backend,
                return_exceptions=return_exceptions,
                **sampling,
            )
        )

    def _generate(
        self,
        rows: Iterable[Mapping[str, object]],
        num_threads: int | Literal["auto"],
        backend: Backend | None,
        sampling: Mapping[str, Any],
        return_exceptions: bool,
    ) -> Generator[State | Exception, None, None]:
        outcomes = self.program.iter_batch(
            rows, num_threads=num_threads, backend=backend, ordered=True, **sampling
        )

        async def following() -> Any:
            return await anext(outcomes, _END)

        async def close() -> None:
            async with aclosing(outcomes):
                pass

        try:
            while (outcome := self._portal.call(following)) is not _END:
                if outcome.error is not None and return_exceptions:
                    yield outcome.error
                else:
                    yield outcome.result()
        finally:
            self._portal.call(close)

    def trace(self, **arguments: object) -> list[Traced]:
        """The program's nodes, without a backend; see :meth:`Program.trace`."""
        return self.program.trace(**arguments)

    def cache(self, backend: Backend | None = None) -> None:
        """Compute the program's constant prefix ahead; see :meth:`Program.cache`."""
        self._portal.call(functools.partial(self.program.cache, backend))

    def __repr__(self) -> str:
        return f"<BlockingProgram {self.name}{self.program.signature}>"


@overload
def function(
    body: Callable[..., Any] | Program, *, num_api_spec_tokens: int | None = None
) -> BlockingProgram: ...


@overload
def function(
    body: None = None, *, num_api_spec_tokens: int | None = None
) -> Callable[[Callable[..., Any] | Program], BlockingProgram]: ...


def function(
    body: Callable[..., Any] | Program | None = None, *, num_api_spec_tokens: int | None = None
) -> BlockingProgram | Callable[[Callable[..., Any] | Program], BlockingProgram]:
    """Make a blocking program of a function, or of a program of :func:`asyncsgl.function`.

    Args:
        body: a function whose first parameter is the program state.
        num_api_spec_tokens: see :func:`asyncsgl.function`.

    Raises:
        ProgramError: the function has no parameter for the state.
    """
    if body is None:
        return functools.partial(function, num_api_spec_tokens=num_api_spec_tokens)
    if not isinstance(body, Program):
        body = Program(body, num_api_spec_tokens=num_api_spec_tokens)
    return BlockingProgram(body, PORTAL)
