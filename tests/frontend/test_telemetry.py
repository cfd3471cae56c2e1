"""Instruments: what they see, in which order, and that nothing is made without them."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

import asyncsgl as sgl
from asyncsgl import events, telemetry
from asyncsgl.testing import ScriptedBackend

pytestmark = pytest.mark.anyio


class Log:
    """An instrument that keeps every event by run."""

    def __init__(self, only: str | None = None) -> None:
        self.runs: dict[str, list[events.Event]] = defaultdict(list)
        self._only = only

    def listen(self, program: str, run_id: str) -> events.Listener | None:
        if self._only not in (None, program):
            return None
        return _Listener(self.runs[run_id])


class _Listener:
    def __init__(self, into: list[events.Event]) -> None:
        self._into = into

    def on(self, event: events.Event) -> None:
        self._into.append(event)


@sgl.function
async def program(s: sgl.ProgramState) -> None:
    s += sgl.user("q") + sgl.assistant(sgl.gen("x"))
    async with s.fork(1) as branches:
        branches += sgl.select("y", ["a", "b"])


@sgl.function
async def other(s: sgl.ProgramState) -> None:
    s += sgl.gen("x")


async def test_a_run_without_streaming_tells_what_started_and_finished() -> None:
    log = Log()
    backend = ScriptedBackend("abc", name="b")
    with telemetry.instrumented(log) as installed:
        assert installed is log
        state = await program.run(backend=backend)
    [seen] = log.runs.values()
    first, second = backend.requests
    assert seen == [
        events.RunStarted("program", state.run_id),
        events.VariableStarted((), "x", first, "b"),
        events.VariableFinished((), "x", "abc", state.meta("x")),
        events.BranchStarted((0,)),
        events.VariableStarted((0,), "y", second, "b"),
        events.VariableFinished((0,), "y", "a", state.meta("y")[0]),
        events.BranchFinished((0,)),
        events.RunFinished("program", state.run_id),
    ]
    await program.run(backend=backend)
    assert len(log.runs) == 1, "it is taken out with its block"


async def test_the_first_token_is_seen_while_streaming() -> None:
    log = Log()
    with telemetry.instrumented(log):
        async with other.stream(backend=ScriptedBackend("abc", chunk_size=1)) as run:
            await run.result()
    [seen] = log.runs.values()
    assert [type(event).__name__ for event in seen] == [
        "RunStarted",
        "VariableStarted",
        "Text",
        "Text",
        "Text",
        "VariableFinished",
        "RunFinished",
    ]


async def test_failures_and_cancellation_are_told() -> None:
    log, error = Log(), LookupError("no")
    with telemetry.instrumented(log):
        with pytest.raises(LookupError):
            await other.run(backend=ScriptedBackend(error))
        task = asyncio.create_task(other.run(backend=ScriptedBackend(delay=600)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    failed, cancelled = log.runs.values()
    for seen, kind in ((failed, LookupError), (cancelled, asyncio.CancelledError)):
        variable, run = seen[-2:]
        assert isinstance(variable, events.VariableFailed)
        assert isinstance(run, events.RunFinished)
        assert isinstance(variable.error, kind)
        assert isinstance(run.error, kind)


async def test_an_instrument_may_leave_runs_alone_and_several_go_together() -> None:
    everything, some = Log(), Log(only="other")
    telemetry.add_instrument(everything)
    telemetry.add_instrument(some)
    try:
        await asyncio.gather(*(other.run(backend=ScriptedBackend("a")) for _ in range(3)))
        await program.run(backend=ScriptedBackend("a"))
    finally:
        telemetry.remove_instrument(everything)
        telemetry.remove_instrument(some)
        telemetry.remove_instrument(some)
    assert (len(everything.runs), len(some.runs)) == (4, 3)
    for run_id, seen in everything.runs.items():
        assert isinstance(seen[0], events.RunStarted)
        assert seen[0].run_id == run_id


@pytest.mark.parametrize("kind", [events.VariableStarted, events.VariableFinished])
async def test_a_listener_that_fails_fails_the_run(kind: type) -> None:
    class Broken:
        def listen(self, program: str, run_id: str) -> events.Listener:
            return self

        def on(self, event: events.Event) -> None:
            if isinstance(event, kind):
                raise ArithmeticError("broken")

    backend = ScriptedBackend("a", delay=0.001)
    with telemetry.instrumented(Broken()):
        for run in (program, other):
            with pytest.raises(ArithmeticError, match="broken"):
                await run.run(backend=backend)
    assert backend.running == 0
