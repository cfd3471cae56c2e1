"""Cancelling a run, wherever it is, reaches the backend and leaves nothing running."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

import asyncsgl as sgl
from asyncsgl.backends.base import FEATURES
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Delta, Generation, GenRequest
from tests.frontend.conftest import Left

pytestmark = pytest.mark.anyio


class Observed(ScriptedBackend):
    """Says when it has been reached: by a request, and by the first piece of a stream."""

    def __init__(self, answer: str = "abc", *, delay: float = 0.0, wait_for: int = 1) -> None:
        super().__init__(answer, delay=delay, chunk_size=1)
        self.asked = asyncio.Event()
        self.flowing = asyncio.Event()
        self._wait_for = wait_for

    def _count(self) -> None:
        if len(self.requests) + 1 == self._wait_for:
            self.asked.set()

    async def generate(self, request: GenRequest) -> Generation:
        self._count()
        return await super().generate(request)

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        self._count()
        deltas = super().stream(request)
        try:
            async for delta in deltas:
                self.flowing.set()
                yield delta
        finally:
            await deltas.aclose()


@sgl.function
async def one(s: sgl.ProgramState) -> None:
    s += sgl.user("q") + sgl.assistant(sgl.gen("x"))


@sgl.function
async def awaiting(s: sgl.ProgramState) -> None:
    await s.gen("x")


@sgl.function
async def forked(s: sgl.ProgramState) -> None:
    s.fork(3).__iadd__(sgl.gen("x"))


@sgl.function
async def joining(s: sgl.ProgramState) -> None:
    async with s.fork(3) as branches:
        branches += sgl.gen("x")


@sgl.function
async def nested(s: sgl.ProgramState) -> None:
    async with s.fork(1) as outer, outer[0].fork(3) as inner:
        inner += sgl.gen("x")


@sgl.function
async def selecting(s: sgl.ProgramState) -> None:
    s += "x" + sgl.select("x", ["a", "b"])
    await s["x"]


@sgl.function
def plain(s: sgl.ProgramState) -> None:
    s += sgl.gen("x")


PROGRAMS = {"queued": (one, 1), "awaited": (awaiting, 1), "plain": (plain, 1)}
PROGRAMS |= {"fork": (forked, 3), "join": (joining, 3), "nested": (nested, 3)}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("which", PROGRAMS)
async def test_before_the_first_byte(which: str, times: int, tasks_left: Left) -> None:
    program, calls = PROGRAMS[which]
    backend = Observed(delay=600, wait_for=calls)
    task = asyncio.create_task(program.run(backend=backend))
    await backend.asked.wait()
    await asyncio.sleep(0)
    assert backend.running == calls
    for _ in range(times):
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_left()
    assert (backend.running, backend.cancelled) == (0, calls)


async def test_before_it_began(tasks_left: Left) -> None:
    backend = Observed()
    task = asyncio.create_task(one.run(backend=backend))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_left()
    assert not backend.requests


@pytest.mark.parametrize("program", [one, awaiting, forked, joining])
async def test_just_after_it_began(program: sgl.Program, tasks_left: Left) -> None:
    backend = Observed(delay=600)
    task = asyncio.create_task(program.run(backend=backend))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_left()
    assert backend.running == 0


async def test_in_a_select(tasks_left: Left) -> None:
    backend = ScriptedBackend(delay=600)
    task = asyncio.create_task(selecting.run(backend=backend))
    for _ in range(5):
        await asyncio.sleep(0)
    assert backend.running == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_left()
    assert (backend.running, backend.cancelled) == (0, 1)


async def test_while_a_template_is_fetched(tasks_left: Left) -> None:
    reached = asyncio.Event()

    class Slow(ScriptedBackend):
        async def chat_template_in_use(self) -> sgl.ChatTemplate:
            reached.set()
            await asyncio.Event().wait()
            raise AssertionError

    backend = Slow("x", capabilities=sgl.Capabilities(frozenset(FEATURES), wants_text=True))
    task = asyncio.create_task(one.run(backend=backend))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_left()


Leave = Callable[[sgl.ProgramStream], Awaitable[None]]


async def leave_at_once(run: sgl.ProgramStream) -> None:
    """Reads nothing."""


async def leave_by_break(run: sgl.ProgramStream) -> None:
    async for _ in run.text("x"):
        return


async def leave_by_error(run: sgl.ProgramStream) -> None:
    async for _ in run:
        raise LookupError


@pytest.mark.parametrize("leave", [leave_at_once, leave_by_break, leave_by_error])
async def test_a_stream_that_is_left_early(leave: Leave, tasks_left: Left) -> None:
    backend = Observed("word " * 1000)
    run = awaiting.stream(backend=backend)
    raised = None
    try:
        async with run:
            await backend.asked.wait()
            await leave(run)
    except LookupError as error:
        raised = error
    assert (raised is not None) == (leave is leave_by_error)
    assert not tasks_left()
    assert (backend.running, backend.cancelled) == (0, 1)
    with pytest.raises(sgl.ClosedError, match="was cancelled"):
        await run.result()


@pytest.mark.parametrize("times", [1, 2])
async def test_in_the_middle_of_a_stream(times: int, tasks_left: Left) -> None:
    backend = Observed("word " * 100_000)

    async def read() -> None:
        async with joining.stream(backend=backend) as run:
            async for _ in run:
                pass

    task = asyncio.create_task(read())
    await backend.flowing.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_left()
    assert backend.running == 0
    assert backend.cancelled == len(backend.requests)


async def test_in_a_batch(tasks_left: Left) -> None:
    backend = Observed(delay=600, wait_for=4)
    task = asyncio.create_task(awaiting.run_batch([{}] * 50, num_threads=4, backend=backend))
    await backend.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_left()
    assert (len(backend.requests), backend.running, backend.cancelled) == (4, 0, 4)


async def test_a_deadline(tasks_left: Left) -> None:
    backend = ScriptedBackend(delay=600)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await joining.run(backend=backend)
    assert not tasks_left()
    assert (backend.running, backend.cancelled) == (0, 3)


async def test_a_deadline_inside_the_body_fails_only_what_it_is_around(tasks_left: Left) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> str:
        s += sgl.gen("x")
        try:
            async with asyncio.timeout(0.02):
                await s["x"]
        except TimeoutError:
            return "waited enough"
        return "came"

    backend = ScriptedBackend("a", delay=0.1)
    state = await program.run(backend=backend)
    assert (state.return_value, state["x"]) == ("waited enough", "a")
    assert not tasks_left()


async def test_a_body_that_swallows_the_cancellation(tasks_left: Left) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> str:
        s += sgl.gen("x")
        with contextlib.suppress(asyncio.CancelledError):
            await s["x"]
        return "went on"

    backend = Observed(delay=600)
    task = asyncio.create_task(program.run(backend=backend))
    await backend.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(task), 5)
    assert not tasks_left()
    assert (backend.running, backend.cancelled) == (0, 1)


async def test_a_backend_that_is_slow_to_give_up_is_waited_for(tasks_left: Left) -> None:
    freed = asyncio.Event()

    class Stubborn(Observed):
        async def generate(self, request: GenRequest) -> Generation:
            try:
                return await super().generate(request)
            finally:
                await asyncio.sleep(0.02)
                freed.set()

    backend = Stubborn(delay=600)
    task = asyncio.create_task(one.run(backend=backend))
    await backend.asked.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert freed.is_set()
    assert not tasks_left()


async def test_cancelling_whoever_waits_for_a_result_leaves_the_run_alone() -> None:
    backend = Observed()
    async with awaiting.stream(backend=backend) as run:
        waiting = asyncio.create_task(run.result())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await run.result())["x"] == "abc"
    assert backend.cancelled == 0


def test_one_backend_in_loop_after_loop_and_in_threads() -> None:
    backend = ScriptedBackend("a", delay=0.001)

    def use() -> None:
        async def several() -> list[sgl.State]:
            return list(await asyncio.gather(*(one.run(backend=backend) for _ in range(20))))

        states.extend(asyncio.run(several()))

    states: list[sgl.State] = []
    for _ in range(2):
        use()
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state["x"] for state in states] == ["a"] * 120
    assert backend.running == 0


async def test_many_cancels_at_any_turn_of_the_loop(tasks_left: Left) -> None:
    backend = ScriptedBackend("a b c", chunk_size=1)
    for turns in range(40):
        for program in (one, joining, nested, selecting):
            task = asyncio.create_task(program.run(backend=backend))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert backend.running == 0
    assert not tasks_left()
