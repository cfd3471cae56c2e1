"""One run of a program: its task group, its body, its finished state."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from ..backends.base import Backend
from ..lang.chat_template import ChatTemplate, get_chat_template
from ..telemetry import listeners_for
from ..types import SamplingParams
from .door import Door
from .events import Listener, RunFinished, RunStarted
from .interpreter import Interpreter
from .result import State, collect
from .speculation import Speculation
from .state import ProgramState

__all__ = ["Call"]

_run_numbers = itertools.count(1)


class Call:
    """One run of a program, complete and checked, not yet started.

    Args:
        name: the program's name.
        body: its function.
        arguments: everything that the function takes but the state.
        backend: where to run.
        defaults: sampling defaults of the run.
        door: makes the way for the body to reach its run.
        num_api_spec_tokens: most tokens of one call for a whole turn, where such calls are made.
    """

    __slots__ = (
        "arguments",
        "backend",
        "body",
        "defaults",
        "door",
        "name",
        "num_api_spec_tokens",
        "run_id",
    )

    def __init__(
        self,
        name: str,
        body: Callable[..., Any],
        arguments: Mapping[str, object],
        backend: Backend,
        defaults: SamplingParams,
        door: Callable[[], Door],
        num_api_spec_tokens: int | None = None,
    ) -> None:
        self.name = name
        self.body = body
        self.arguments = arguments
        self.backend = backend
        self.defaults = defaults
        self.door = door
        self.num_api_spec_tokens = num_api_spec_tokens
        self.run_id = f"run-{os.getpid():x}-{next(_run_numbers):x}"

    def run(
        self,
        listeners: Sequence[Listener] = (),
        *,
        streaming: bool = False,
    ) -> Coroutine[Any, Any, State]:
        """Run to the end: one task group, of which nothing is left afterwards.

        Args:
            listeners: take the run's events, besides those of the installed instruments.
            streaming: generate piece by piece.

        Raises:
            Exception: the program's or a generation's, with the unfinished state as
                ``error.state``.
        """
        listeners = (*listeners, *listeners_for(self.name, self.run_id))
        if listeners:
            return self._watched(listeners, streaming)
        return self._in_task_group((), streaming)

    async def _watched(self, listeners: Sequence[Listener], streaming: bool) -> State:
        for listener in listeners:
            listener.on(RunStarted(self.name, self.run_id))
        error: BaseException | None = None
        try:
            return await self._in_task_group(listeners, streaming)
        except BaseException as failure:
            error = failure
            raise
        finally:
            for listener in listeners:
                listener.on(RunFinished(self.name, self.run_id, error))

    async def _in_task_group(self, listeners: Sequence[Listener], streaming: bool) -> State:
        door = self.door()
        tasks = asyncio.TaskGroup()
        run = Interpreter(
            self.backend,
            self.defaults,
            tasks,
            listeners,
            streaming=streaming,
            speculation=Speculation.of(self.num_api_spec_tokens, self.backend, door),
        )
        s = ProgramState(run, run.main, door)
        failure: Exception | None = None
        value: object = None
        task = asyncio.current_task()
        cancels = task.cancelling() if task is not None else 0
        try:
            async with tasks:
                try:
                    value = await door.run_body(self.body, s, self.arguments)
                    if task is not None and task.cancelling() > cancels:
                        raise asyncio.CancelledError  # the body caught it, but the run ends
                    await run.finish()
                except Exception as error:  # noqa: BLE001 - raised below, with the state
                    failure = error
                    run.cancel(run.main.family())
                finally:
                    run.close()
        except ExceptionGroup as group:
            failure = failure or _first(group)
        template = await _template(run, failed=failure is not None)
        variables = collect(s._variables)
        state = State(variables, run.main.prompt(), template, run.usage, value, self.run_id)
        if failure is not None:
            _attach(failure, state)
            raise failure
        return state


async def _template(run: Interpreter, *, failed: bool) -> ChatTemplate:
    """The template for the state's text; after a failure, without asking the backend."""
    if run.template is not None:
        return run.template
    return get_chat_template("default") if failed else await run.chat_template()


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """The first exception in a group that is none itself."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def _attach(error: Exception, state: State) -> None:
    """Give the error the unfinished state; exceptions that take no attributes go without."""
    try:
        error.state = state  # type: ignore[attr-defined]
    except AttributeError:
        error.add_note(f"variables known when the run failed: {state.variables!r}")
