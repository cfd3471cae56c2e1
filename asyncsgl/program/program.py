"""``@function``: programs, and how they are run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from contextlib import aclosing, contextmanager
from typing import Any, Literal, cast, overload

from ..backends.base import Backend
from ..batch.executor import Outcome, bounded
from ..batch.progress import Display, show
from ..errors import BatchError, InvalidArgument, ProgramError
from ..lang.api import sampling_of
from ..sampling import SAMPLING_FIELDS, Overrides, SamplingParams
from ..types import Usage
from .call import Call
from .defaults import choose_backend
from .door import CoroutineDoor, Door, PlainDoor
from .prefix import SharedPrefix, prefix_request
from .result import State
from .state import is_count
from .stream import ProgramStream
from .tracer import Traced, constant_prefix, trace

__all__ = ["Program", "function"]

Arguments = Mapping[str, object]
Body = Callable[..., Any]

_SAMPLING_NAMES = frozenset((*SAMPLING_FIELDS, "max_new_tokens"))


class Program:
    """A function that prompts language models; made by :func:`function`.

    The function's first parameter is the program state ``s``; the others are the program's
    arguments. Where an argument has the name of a sampling field, the argument wins.
    """

    def __init__(
        self,
        body: Body,
        *,
        num_api_spec_tokens: int | None = None,
        bound: Arguments | None = None,
        plain_door: Callable[[], Door] = PlainDoor,
    ) -> None:
        parameters = list(inspect.signature(body).parameters.values())
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise ProgramError(
                f"the program {body.__qualname__} needs a first parameter for its state: "
                f"def {body.__name__}(s, ...)"
            )
        for parameter in parameters[1:]:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise ProgramError(
                    f"the parameter {str(parameter).partition(':')[0]!r} of the program "
                    f"{body.__qualname__} cannot be given by name, and arguments are"
                )
        if num_api_spec_tokens is not None and not is_count(num_api_spec_tokens):
            raise InvalidArgument(
                "num_api_spec_tokens", f"must be at least 1, got {num_api_spec_tokens!r}"
            )
        functools.update_wrapper(self, body)
        self.body = body
        self.num_api_spec_tokens = num_api_spec_tokens
        self.signature = inspect.Signature(parameters[1:])
        self.bound: dict[str, object] = dict(bound or {})
        self._plain_door = plain_door
        self._door = CoroutineDoor if inspect.iscoroutinefunction(body) else plain_door
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._names = tuple(p.name for p in parameters[1:] if p.kind is not p.VAR_KEYWORD)
        self._required = tuple(p.name for p in parameters[1:] if _is_required(p))
        self._sampling_names = _SAMPLING_NAMES.difference(self._names)
        self._takes_all = takes_all

    @property
    def name(self) -> str:
        """The function's name."""
        return self.body.__name__

    def bind(self, **arguments: object) -> Program:
        """This program with some of its arguments fixed.

        Raises:
            InvalidArgument: the program has no such argument.
        """
        self._refuse_unknown(arguments)
        return Program(
            self.body,
            num_api_spec_tokens=self.num_api_spec_tokens,
            bound={**self.bound, **arguments},
            plain_door=self._plain_door,
        )

    def with_plain_door(self, plain_door: Callable[[], Door]) -> Program:
        """This program, with another way for plain ``def`` bodies to reach their run."""
        return Program(
            self.body,
            num_api_spec_tokens=self.num_api_spec_tokens,
            bound=self.bound,
            plain_door=plain_door,
        )

    def check_arguments(self, arguments: Arguments) -> None:
        """Refuse arguments that the program cannot be called with.

        Raises:
            InvalidArgument: names the unknown or the missing ones.
        """
        given = {**self.bound, **arguments}
        self._refuse_unknown(given)
        missing = [name for name in self._required if name not in given]
        if missing:
            raise InvalidArgument(", ".join(missing), f"missing arguments of {self.name}()")

    def _refuse_unknown(self, arguments: Arguments) -> None:
        unknown = set(arguments).difference(self._names)
        if unknown and not self._takes_all:
            known = ", ".join(self._names) or "none"
            raise InvalidArgument(
                ", ".join(sorted(unknown)), f"unknown to {self.name}(); its arguments are: {known}"
            )

    # -- running ------------------------------------------------------------------------

    async def run(
        self, *args: Any, backend: Backend | None = None, **arguments_and_sampling: Any
    ) -> State:
        """Run the program once.

        Args:
            *args: the program's arguments, by position.
            backend: where to run; the default backend unless given.
            **arguments_and_sampling: the program's arguments, and sampling fields
                (:class:`~asyncsgl.SamplingParams`, ``max_new_tokens``) as defaults for every
                generation that does not set them itself.

        Returns:
            the finished state.

        Raises:
            InvalidArgument: an argument is unknown or missing, or a field out of its range.
            UsageError: there is no backend.
            Exception: whatever the program or a generation raises, with the unfinished state
                as ``error.state``.
        """
        call = self.call(args, arguments_and_sampling, backend)
        return await call.run()

    def __call__(self, *args: Any, **kwargs: Any) -> Awaitable[State]:
        """The same as :meth:`run`."""
        return self.run(*args, **kwargs)

    def stream(
        self, *args: Any, backend: Backend | None = None, **arguments_and_sampling: Any
    ) -> ProgramStream:
        """Run the program once and watch it: ``async with prog.stream(…) as run``.

        Takes what :meth:`run` takes.
        """
        call = self.call(args, arguments_and_sampling, backend)
        return ProgramStream(functools.partial(call.run, streaming=True))

    def iter_batch(
        self,
        rows: Iterable[Arguments] | AsyncIterable[Arguments],
        *,
        num_threads: int | Literal["auto"] = "auto",
        backend: Backend | None = None,
        ordered: bool = False,
        **sampling: Any,
    ) -> AsyncGenerator[Outcome[Arguments, State], None]:
        """Run the program for every row, giving each outcome as soon as it is there.

        Rows are taken as they are needed, and outcomes wait for whoever reads them, so that
        memory stays flat however many rows there are.

        Args:
            rows: the arguments of each run.
            num_threads: how many runs at once; "auto" asks the backend.
            backend: where to run; the default backend unless given.
            ordered: give the outcomes in the order of the rows.
            **sampling: defaults for every generation.

        Raises:
            InvalidArgument: a setting is out of its range.
            UsageError: there is no backend.
        """
        chosen = choose_backend(backend)
        fields = self._sampling_only(sampling)
        concurrency = concurrency_of(num_threads, chosen)
        if chosen.keeps_prefixes and concurrency > 1:
            chosen = SharedPrefix(chosen)

        async def run_row(row: Arguments) -> State:
            return await self.call((), {**row}, chosen, fields).run()

        return bounded(run_row, rows, concurrency=concurrency, ordered=ordered)

    async def run_batch(
        self,
        rows: Sequence[Arguments] | Iterable[Arguments],
        *,
        num_threads: int | Literal["auto"] = "auto",
        progress_bar: bool = False,
        backend: Backend | None = None,
        return_exceptions: bool = False,
        **sampling: Any,
    ) -> list[Any]:
        """Run the program for every row and give the finished states, in order.

        Every row runs to its end, also when others fail.

        Args:
            rows: the arguments of each run.
            num_threads: how many runs at once; "auto" asks the backend.
            progress_bar: show a bar on the terminal.
            backend: where to run; the default backend unless given.
            return_exceptions: a failed row's exception stands in the list, in its place.
            **sampling: defaults for every generation.

        Raises:
            BatchError: rows failed and ``return_exceptions`` is false; its ``results`` has
                the states and exceptions of all rows, so that nothing is lost.
        """
        results: dict[int, State | Exception] = {}
        outcomes = self.iter_batch(rows, num_threads=num_threads, backend=backend, **sampling)
        with _display(rows, wanted=progress_bar) as display:
            async with aclosing(outcomes):
                async for outcome in outcomes:
                    result = outcome.error if outcome.error is not None else outcome.value
                    results[outcome.index] = cast("State | Exception", result)
                    if display is not None:
                        _show(display, outcome)
        in_order = [results[index] for index in sorted(results)]
        failed = [result for result in in_order if isinstance(result, Exception)]
        if failed and not return_exceptions:
            raise BatchError(
                f"{len(failed)} of {len(in_order)} rows failed, the first with: {failed[0]!r}. "
                "This error's .results has all states; return_exceptions=True returns them",
                results=in_order,
            ) from failed[0]
        return in_order

    # -- without running ------------------------------------------------------------------

    def trace(self, **arguments: object) -> list[Traced]:
        """What the program appends, found without a backend.

        Arguments that are not given and have no default, and texts that a model would write,
        are placeholders: the name between U+E000 and U+E001. The program's own Python code runs.

        Returns:
            the language's nodes in order; a fork is one node with a list for each branch.

        Raises:
            InvalidArgument: an argument is unknown.
            ProgramError: the program waits for something else than its own state.
        """
        self._refuse_unknown(arguments)
        defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        given = {**defaults, **self.bound, **arguments}
        return trace(self.body, self.signature.parameters, given)

    async def cache(self, backend: Backend | None = None) -> str:
        """Compute the text that all runs begin with ahead, where the backend keeps it.

        The text is found by tracing, so the program's own Python code runs, with
        placeholders for its arguments.

        Returns:
            the text; empty if runs begin with different texts, and then nothing is sent.

        Raises:
            UnsupportedFeature: the backend keeps no prefixes.
            UsageError: there is no backend.
        """
        chosen = choose_backend(backend)
        nodes = trace(self.body, self.signature.parameters, self.bound, tolerant=True)
        prefix = constant_prefix(nodes, await chosen.chat_template_in_use())
        if prefix:
            await chosen.cache_prefix(prefix_request(prefix))
        return prefix

    # -- internals -------------------------------------------------------------------------

    def call(
        self,
        args: tuple[Any, ...],
        arguments: Mapping[str, Any],
        backend: Backend | None,
        fields: SamplingParams | None = None,
    ) -> Call:
        """Check everything that a run needs and make the run, without starting it.

        Args:
            args: the program's arguments by position.
            arguments: its arguments by name, and sampling fields unless ``fields`` is given.
            backend: where to run; the default backend if None.
            fields: the run's sampling defaults.

        Raises:
            InvalidArgument: an argument is unknown, missing or given twice.
            UsageError: there is no backend.
        """
        mine = dict(zip(self._names, args, strict=False))
        if len(args) > len(self._names):
            raise InvalidArgument("*args", f"{len(args)} are too many for {self.name}()")
        sampling: dict[str, Any] = {}
        for name, value in arguments.items():
            if fields is None and name in self._sampling_names:
                sampling[name] = value
            elif name in mine:
                raise InvalidArgument(name, f"given twice to {self.name}()")
            else:
                mine[name] = value
        self.check_arguments(mine)
        defaults = fields if fields is not None else sampling_of(cast("Overrides", sampling))
        chosen = choose_backend(backend)
        filled = {**self.bound, **mine}
        tokens = self.num_api_spec_tokens
        return Call(self.name, self.body, filled, chosen, defaults, self._door, tokens)

    def _sampling_only(self, sampling: Mapping[str, Any]) -> SamplingParams:
        unknown = set(sampling) - _SAMPLING_NAMES
        if unknown:
            raise InvalidArgument(
                ", ".join(sorted(unknown)), "not a sampling field; arguments belong in the rows"
            )
        return sampling_of(cast("Overrides", dict(sampling)))

    def __repr__(self) -> str:
        return f"<Program {self.name}{self.signature}>"


@contextmanager
def _display(rows: object, *, wanted: bool) -> Iterator[Display | None]:
    """The progress bar of a batch, if one is wanted."""
    if not wanted:
        yield None
        return
    with show(len(rows) if isinstance(rows, Sized) else None) as display:
        display.rows_begin()
        yield display


def _show(display: Display, outcome: Outcome[Arguments, State]) -> None:
    if outcome.error is not None:
        state = getattr(outcome.error, "state", None)
        usage = state.usage if isinstance(state, State) else Usage()
        display.row(usage, f"{type(outcome.error).__name__}: {outcome.error}", outcome.index + 1)
    elif outcome.value is not None:
        display.row(outcome.value.usage)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty and parameter.kind not in (
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    )


def concurrency_of(num_threads: object, backend: Backend) -> int:
    """How many runs at once.

    Raises:
        InvalidArgument: neither "auto" nor a whole number of 1 or more.
    """
    if num_threads == "auto":
        return backend.default_concurrency
    if not is_count(num_threads):
        raise InvalidArgument("num_threads", f"must be 'auto' or at least 1, got {num_threads!r}")
    return num_threads


@overload
def function(body: Body, *, num_api_spec_tokens: int | None = None) -> Program: ...


@overload
def function(
    body: None = None, *, num_api_spec_tokens: int | None = None
) -> Callable[[Body], Program]: ...


def function(
    body: Body | None = None, *, num_api_spec_tokens: int | None = None
) -> Program | Callable[[Body], Program]:
    """Make a program of a function whose first parameter is the program state.

    Args:
        body: an ``async def``, or a plain ``def`` that appends without waiting.
        num_api_spec_tokens: where the model cannot continue an assistant turn that has begun, as
            on chat APIs, ask for the whole turn in one call of so many tokens and read its
            generations from the answer. Without effect where the model can.

    Raises:
        InvalidArgument: ``num_api_spec_tokens`` is not a whole number of 1 or more.
        ProgramError: the function has no parameter for the state.
    """
    if body is not None:
        return Program(body, num_api_spec_tokens=num_api_spec_tokens)
    return functools.partial(Program, num_api_spec_tokens=num_api_spec_tokens)
