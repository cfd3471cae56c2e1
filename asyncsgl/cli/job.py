"""One batch from its input file to its output file."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..backends.base import Backend
from ..backends.spec import backend_from_spec
from ..batch.executor import bounded
from ..batch.formats import InputRow, RowError, RowFile
from ..batch.journal import Journal
from ..batch.result import RowFailure, RowResult
from ..errors import AuthenticationError, ClosedError, NotFoundError
from ..program.result import State, to_json_value
from ..types import SamplingParams, Usage
from .load import load_object
from .shapes import program_for

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping
    from pathlib import Path

    from ..batch.formats import JsonValue
    from ..batch.progress import Display
    from ..program.program import Program

__all__ = ["BatchJob", "BatchPlan"]

DEFAULT_MAX_TOKENS = 256
DEFAULT_TEMPERATURE = 0.0

# Errors that every other row would meet, too.
_HOPELESS = (AuthenticationError, NotFoundError, ClosedError)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What a batch is asked to do.

    Args:
        source: the file of the rows; ``None`` is the standard input.
        output: the file of the results.
        program: what to run with each row; ``None`` for the programs of the known shapes.
        model: where to run it: a backend's spec, or ``FILE.py:NAME`` of a backend object.
        concurrency: rows at work at once; ``None`` for what suits the backend.
        max_tokens: most tokens a generation; ``None`` for 256 where the backend takes it.
        temperature: of each generation; ``None`` for 0 where the backend takes it.
        overwrite: begin anew instead of resuming.
    """

    source: Path | None
    output: Path
    program: Program | None
    model: str
    concurrency: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    overwrite: bool = False

    def sampling(self, backend: Backend) -> SamplingParams:
        """The sampling of every generation that does not set its own.

        Raises:
            InvalidArgument: a value is out of its range.
        """
        can = backend.capabilities
        defaults = SamplingParams(
            max_tokens=DEFAULT_MAX_TOKENS if can.support("max_tokens") != "refused" else None,
            temperature=DEFAULT_TEMPERATURE if can.support("temperature") != "refused" else None,
        )
        return defaults.merged(
            SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature)
        )


@dataclass(frozen=True, slots=True)
class _Ready:
    """A row and the program to run for it, or the error that makes it unusable."""

    row: InputRow
    program: Program | None
    error: Exception | None


class BatchJob:
    """Runs a plan.

    Args:
        plan: what to do.
        display: is told how it goes.

    Attributes:
        dropped: results that :meth:`run` removed because the input has no such row any more.
    """

    def __init__(self, plan: BatchPlan, display: Display) -> None:
        self._plan = plan
        self._display = display
        self._rows = 0
        self.dropped = 0

    async def run(self) -> None:
        """Answer every row that has no answer yet, and put the results in order.

        The backend starts only if there is a row to run.

        Raises:
            BatchError: the input or the output is unusable.
            BackendError: the backend cannot start or refuses every row.
        """
        plan, display = self._plan, self._display
        backend = self._backend()
        sampling = plan.sampling(backend)
        with RowFile(plan.source) as file:
            display.stage("counting the rows")
            display.tally.total = await file.count()
            display.stage("looking for earlier results")
            journal = Journal(plan.output, self._settings(sampling), overwrite=plan.overwrite)
            async with journal, aclosing(self._pending(file, journal)) as pending:
                runner = _Runner(backend, sampling, journal, display)
                first = await self._first_usable(pending, runner)
                if first is not None:
                    display.stage(f"starting {plan.model}")
                    async with backend:
                        display.rows_begin()
                        await self._run_rows(_chained(first, pending), runner)
                self.dropped = await journal.finish(self._rows)

    def _backend(self) -> Backend:
        model = self._plan.model
        if ".py:" in model:
            how = "make it an object of a Backend"
            return load_object(model, Backend, how)  # type: ignore[type-abstract]
        return backend_from_spec(model, progress=self._display.stage)

    def _settings(self, sampling: SamplingParams) -> Mapping[str, JsonValue]:
        program = self._plan.program
        return {
            "program": None if program is None else program.name,
            "model": self._plan.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }

    async def _pending(self, file: RowFile, journal: Journal) -> AsyncGenerator[_Ready, None]:
        """The rows that have no answer yet, each checked."""
        async for row in file.rows():
            self._rows = row.index + 1
            if row.value is not None and journal.has_answer(row.index, row.value):
                self._display.skip()
            else:
                yield self._checked(row)

    def _checked(self, row: InputRow) -> _Ready:
        if row.value is None:
            return _Ready(row, None, row.error)
        try:
            program = self._plan.program or program_for(row.value)
            program.check_arguments(row.value)
            return _Ready(row, program.bind(**row.value), None)
        except Exception as error:  # noqa: BLE001 - it becomes the row's
            return _Ready(row, None, error)

    async def _first_usable(self, pending: AsyncIterator[_Ready], runner: _Runner) -> _Ready | None:
        """The first row that needs the backend; the bad ones before it get their results."""
        async for ready in pending:
            if ready.error is None:
                return ready
            await runner.answer(ready)
        return None

    async def _run_rows(self, rows: AsyncIterator[_Ready], runner: _Runner) -> None:
        concurrency = self._plan.concurrency or runner.backend.default_concurrency
        outcomes = bounded(runner.answer, rows, concurrency=concurrency)
        async with aclosing(outcomes):
            async for outcome in outcomes:
                outcome.result()  # what a row's result does not hold ends the batch


async def _chained(first: _Ready, rest: AsyncIterator[_Ready]) -> AsyncGenerator[_Ready, None]:
    yield first
    async for ready in rest:
        yield ready


class _Runner:
    """Runs single rows and hands their results to the journal."""

    def __init__(
        self, backend: Backend, sampling: SamplingParams, journal: Journal, display: Display
    ) -> None:
        self.backend = backend
        self._sampling = {name: getattr(sampling, name) for name in sampling.given()}
        self._journal = journal
        self._display = display

    async def answer(self, ready: _Ready) -> None:
        """Run one row to its result and see it written.

        Raises:
            BatchError: the result cannot be written.
            BackendError, ClosedError: every other row would fail in the same way.
        """
        row = ready.row
        try:
            state = await self._run(ready)
            result = RowResult(
                row.index,
                row.value,
                to_json_value(state.variables),
                state.usage,
                return_value=to_json_value(state.return_value),
            )
            written = self._journal.append(result)
        except _HOPELESS:
            raise
        except Exception as error:  # noqa: BLE001 - the result carries it
            result = _failed(row, error)
            written = self._journal.append(result)
        failure = result.error
        text = None if failure is None else f"{failure.type}: {failure.message}"
        self._display.row(result.usage, text, row.line)
        await written

    async def _run(self, ready: _Ready) -> State:
        if ready.program is None:
            raise ready.error or RowError("the row has no program")
        sampling = {
            name: value
            for name, value in self._sampling.items()
            if name not in ready.program.signature.parameters  # there the row's argument counts
        }
        return await ready.program.run(backend=self.backend, **sampling)


def _failed(row: InputRow, error: Exception) -> RowResult:
    state = getattr(error, "state", None)
    failure = RowFailure(type(error).__name__, str(error) or repr(error), row.line)
    if not isinstance(state, State):
        return RowResult(row.index, row.value, {}, Usage(), failure)
    try:
        variables = to_json_value(state.variables)
    except Exception:  # noqa: BLE001 - the error itself matters more
        variables = {}
    return RowResult(row.index, row.value, variables, state.usage, failure)
