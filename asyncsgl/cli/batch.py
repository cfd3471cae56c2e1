"""``asyncsgl batch``: run a program for every row of a JSONL file."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..batch.progress import show
from ..batch.summary import summarize
from ..errors import BatchError
from ..program.program import Program
from .job import DEFAULT_MAX_TOKENS, BatchJob, BatchPlan
from .load import load_object

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["BATCH_HELP", "batch"]

DEFAULT_MODEL = "smollm2-135m-instruct"

_SOME_FAILED = 1
_STDIN = Path("-")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = "the same command again goes on from there."
_DECORATE = "decorate a function with @asyncsgl.function"

BATCH_HELP = """Run a program for every row of a JSONL file.

Without --program a row is `{"question": …}`, `{"messages": […]}` or `{"prompt": …}` (continued
as it is). With it, a row has the arguments of the program.

One line of JSON a row is written as soon as the row is done. Running the same command again
skips the rows that are answered and tries the failed ones again.

**Examples**

- `asyncsgl batch questions.jsonl`

- `asyncsgl batch rows.jsonl --program capitals.py:capital -o answers.jsonl`

- `asyncsgl batch rows.jsonl --model ./my-model --concurrency 64 --max-tokens 32`

- `cat rows.jsonl | asyncsgl batch - -o answers.jsonl`

**Exit status**: 0 all rows are answered, 1 some failed, 2 the batch could not be run,
130 or 143 interrupted.
"""


def batch(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl", help="The rows; - is the standard input.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="[default: FILE.out.jsonl]"),
    ] = None,
    program: Annotated[
        str | None,
        typer.Option(metavar="FILE_OR_MODULE:NAME", help="The program; a row is its arguments."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="A model's name, a folder, a .gguf file, or FILE.py:NAME of a backend.",
        ),
    ] = DEFAULT_MODEL,
    concurrency: Annotated[
        str, typer.Option(metavar="N|auto", help="Rows at work at once.")
    ] = "auto",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Most tokens a generation; a gen's own wins. [default: {DEFAULT_MAX_TOKENS}]",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="T",
            help="0 takes the most probable token each time; a gen's own wins. [default: 0]",
        ),
    ] = None,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew instead of resuming from OUT.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run a program for every row of a JSONL file; the command's help says the rest."""
    del debug  # whoever runs the command looks at it
    plan = BatchPlan(
        source=None if file == _STDIN else file,
        output=output or _beside(file),
        program=None if program is None else load_object(program, Program, _DECORATE),
        model=model,
        concurrency=_concurrency(concurrency),
        max_tokens=max_tokens,
        temperature=temperature,
        overwrite=overwrite,
    )
    if plan.source is not None and _same(plan.source, plan.output):
        raise BatchError(f"{plan.output} is the input; choose another output file")
    raise typer.Exit(_run(plan))


def _beside(file: Path) -> Path:
    if file == _STDIN:
        raise typer.BadParameter("reading the standard input needs -o OUT")
    return file.with_suffix(".out.jsonl")


def _concurrency(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(
        f"must be 'auto' or a whole number above 0, got {text!r}", param_hint="--concurrency"
    )


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _run(plan: BatchPlan) -> int:
    """Run the plan and say how it went; gives the exit status."""
    stop = _Stop()
    with show() as display:
        job = BatchJob(plan, display)
        asyncio.run(stop.guard(job.run()))
    tally = display.tally
    if stop.signal is not None and not tally.done:
        typer.echo("Interrupted before the first row.", err=True)
        return 128 + stop.signal
    summarize(tally)
    if stop.signal is not None:
        typer.echo(f"Interrupted. What is done is in {plan.output}; {_AGAIN}", err=True)
        return 128 + stop.signal
    if job.dropped:
        gone = f"{job.dropped} results of rows that the input has no more were dropped"
        typer.echo(gone, err=True)
    typer.echo(f"Results: {plan.output}", err=True)
    if tally.failed:
        typer.echo(f"{tally.failed} rows failed; {_AGAIN}", err=True)
        return _SOME_FAILED
    return 0


class _Stop:
    """Turns the first SIGINT or SIGTERM into a cancellation; the second one kills.

    Attributes:
        signal: the signal that came.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    async def guard(self, work: Coroutine[object, object, None]) -> None:
        """Run ``work``; end quietly where a signal cancelled it."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on, number, task)
        try:
            await work
        except asyncio.CancelledError:
            if self.signal is None:
                raise
        finally:
            self._forget(loop)

    def _on(self, number: signal.Signals, task: asyncio.Task[object]) -> None:
        self.signal = number
        self._forget(asyncio.get_running_loop())
        for each in _SIGNALS:
            signal.signal(each, _die)
        task.cancel()

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _die(number: int, _frame: object) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the live display hid the cursor
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
