"""Cancelling a call to a server, at every point: the server is told, nothing is left behind."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import replace

import pytest

import asyncsgl as sgl
from asyncsgl import RuntimeEndpoint
from asyncsgl.program.prefix import prefix_request
from asyncsgl.testing_server import FakeServer, Hang, Refuse
from asyncsgl.types import SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("http_library")]


@sgl.function
async def ask(s: sgl.ProgramState, question: str = "Say") -> None:
    s += question + sgl.gen("answer")


def say(**sampling: int) -> sgl.GenRequest:
    return replace(prefix_request("Say"), sampling=SamplingParams(**sampling))  # type: ignore[arg-type]


class Retried(logging.Handler):
    """Waits for the endpoint to say that it will try again."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("retry"):
            self.event.set()


@pytest.fixture
def retried(caplog: pytest.LogCaptureFixture) -> Iterator[asyncio.Event]:
    """Set when the endpoint waits to try again."""
    caplog.set_level(logging.INFO, "asyncsgl")
    handler = Retried()
    logging.getLogger("asyncsgl").addHandler(handler)
    yield handler.event
    logging.getLogger("asyncsgl").removeHandler(handler)


async def cancelled(task: asyncio.Task[object]) -> None:
    """Cancel ``task``; it ends soon, and by the cancellation."""
    task.cancel()
    async with asyncio.timeout(1.5):
        with pytest.raises(asyncio.CancelledError):
            await task


def others() -> set[str]:
    """The tasks of the endpoint that are still there."""
    found = (repr(task.get_coro()) for task in asyncio.all_tasks())
    return {name for name in found if "endpoint" in name.lower() or "_post_abort" in name}


@pytest.mark.parametrize("notices", [True, False])
async def test_before_the_first_byte(notices: bool) -> None:
    async with (
        FakeServer(faults=[Hang()], notices=notices) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        task = asyncio.ensure_future(there.generate(say()))
        await server.until(lambda: server.running == 1)
        await cancelled(task)
        await server.until(lambda: server.running == 0)
        assert server.aborted == [server.generates()[0]["rid"]]
        assert server.given_up == 1
        await server.until(lambda: server.connections <= 1)  # that of the abort
        assert others() == set()


async def test_in_a_stream() -> None:
    async with (
        FakeServer("a b c", faults=[Hang(after=2)]) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        two = asyncio.Event()

        async def read() -> None:
            async with aclosing(there.stream(say())) as deltas:
                count = 0
                async for _ in deltas:
                    count += 1
                    if count == 2:
                        two.set()

        task = asyncio.ensure_future(read())
        await two.wait()
        await cancelled(task)
        assert server.aborted == [server.generates()[0]["rid"]]
        await server.until(lambda: server.running == 0)
        assert others() == set()


async def test_in_a_program() -> None:
    async with FakeServer(faults=[Hang()]) as server, RuntimeEndpoint(server.url) as there:
        task = asyncio.ensure_future(ask.run(backend=there))
        await server.until(lambda: server.running == 1)
        await cancelled(task)
        assert len(server.aborted) == 1
        assert others() == set()


async def test_by_a_deadline() -> None:
    async with FakeServer(faults=[Hang()]) as server, RuntimeEndpoint(server.url) as there:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ask.run(backend=there)
        assert len(server.aborted) == 1


async def test_while_scoring() -> None:
    async with FakeServer(faults=[None, Hang()]) as server, RuntimeEndpoint(server.url) as there:
        task = asyncio.ensure_future(there.score(say(), [" a", " b"]))
        await server.until(lambda: len(server.generates()) == 2)
        await cancelled(task)
        [prefix] = server.aborted
        assert {rid[:32] for rid in server.generates()[1]["rid"]} == {prefix}


async def test_several_answers_are_ended_by_the_connection_alone() -> None:
    async with FakeServer(faults=[Hang()]) as server, RuntimeEndpoint(server.url) as there:
        task = asyncio.ensure_future(there.generate(say(n=2)))
        await server.until(lambda: server.running == 1)
        await cancelled(task)
        await server.until(lambda: server.running == 0)
        assert server.aborted == []


async def test_while_waiting_for_a_connection() -> None:
    async with (
        FakeServer(faults=[Hang()] * 2) as server,
        RuntimeEndpoint(server.url, max_connections=2) as there,
    ):
        holding = [asyncio.ensure_future(there.generate(say())) for _ in range(2)]
        await server.until(lambda: server.running == 2)
        waiting = asyncio.ensure_future(there.generate(say()))
        await asyncio.sleep(0)
        await cancelled(waiting)
        assert len(server.generates()) == 2
        for task in holding:
            await cancelled(task)
        generation = await there.generate(say())  # the pool is whole
        assert generation.completions[0].finish_reason == "stop"
        assert len(server.aborted) == 2


async def test_while_connecting() -> None:
    """A full queue of a listener that accepts nothing: the connection is never made."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            with suppress(BlockingIOError):
                filler.connect(place)
        async with RuntimeEndpoint(f"http://127.0.0.1:{place[1]}") as there:
            task = asyncio.ensure_future(there.generate(say()))
            await asyncio.sleep(0.05)
            assert not task.done()
            await cancelled(task)
            assert others() == set()
        for filler in fillers:
            filler.close()


async def test_in_back_off(retried: asyncio.Event) -> None:
    faults = [Refuse(503, {"error": "full"}, {"Retry-After": "30"})]
    async with FakeServer(faults=faults) as server, RuntimeEndpoint(server.url) as there:
        task = asyncio.ensure_future(there.generate(say()))
        await retried.wait()
        await cancelled(task)
        assert server.aborted == []  # nothing was under way
        assert server.running == 0


async def test_twice() -> None:
    """A second cancellation does not wait for the server; the abort is still made."""
    async with FakeServer(faults=[Hang()]) as server, RuntimeEndpoint(server.url) as there:
        task = asyncio.ensure_future(there.generate(say()))
        await server.until(lambda: server.running == 1)
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await cancelled(task)
        await server.until(lambda: len(server.aborted) == 1)


async def test_many_at_once_leave_the_pool_whole() -> None:
    async with (
        FakeServer("x", faults=[Hang()] * 200) as server,
        RuntimeEndpoint(server.url, max_connections=50) as there,
    ):
        tasks = [asyncio.ensure_future(ask.run(backend=there)) for _ in range(200)]
        await server.until(lambda: server.running == 50)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in done)
        await server.until(lambda: server.running == 0)
        assert len(server.aborted) == 50
        server.faults.clear()
        states = await ask.run_batch([{}] * 100, backend=there, num_threads=50)
        assert [state["answer"] for state in states] == ["x"] * 100
        assert server.connections <= 50
        assert others() == set()


@pytest.mark.timeout(60)
async def test_two_thousand_programs_at_once(http_library: str) -> None:
    if http_library == "httpx":
        pytest.skip("it takes many seconds for this")
    async with (
        FakeServer("x", first_delay=0.2) as server,
        RuntimeEndpoint(server.url, max_connections=500) as there,
    ):
        states = await asyncio.gather(*(ask.run(backend=there) for _ in range(2000)))
        assert all(state["answer"] == "x" for state in states)
        assert server.accepted <= 501
        assert there.statistics()["retries"] == 0
