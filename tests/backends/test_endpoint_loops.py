"""One endpoint in several event loops and threads; the utilities, also blocking."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import asyncsgl as sgl
import asyncsgl.sync as blocking
from asyncsgl import RuntimeEndpoint
from asyncsgl.testing import ScriptedBackend
from asyncsgl.testing_server import FakeServer, Hang, Refuse

pytestmark = pytest.mark.usefixtures("http_library")

ROOT = Path(__file__).parent.parent.parent


@sgl.function
async def ask(s: sgl.ProgramState) -> None:
    s += "Say" + sgl.gen("answer")


class Served:
    """A fake server on an event loop of its own thread."""

    def __init__(self, **options: object) -> None:
        self._options = options
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: asyncio.Event | None = None
        self.server = FakeServer("x", **options)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),))

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        async with self.server:
            self._ready.set()
            await self._done.wait()

    def start(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self.server

    def wait(self, condition: Callable[[], bool]) -> None:
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self.server.until(condition), self._loop).result(10)

    def stop(self) -> None:
        assert self._loop is not None
        assert self._done is not None
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)


@pytest.fixture
def served() -> Iterator[Served]:
    """A running server in another thread."""
    served = Served()
    served.start()
    yield served
    served.stop()


def test_one_loop_after_another(served: Served) -> None:
    """Each loop's end closes its connections, though nobody closes the endpoint."""
    there = RuntimeEndpoint(served.server.url)
    for _ in range(3):
        state = asyncio.run(ask.run(backend=there))
        assert state["answer"] == "x"
        served.wait(lambda: served.server.connections == 0)
    assert served.server.accepted == 3
    assert [request.path for request in served.server.requests].count("/model_info") == 1


def test_loops_at_once_in_threads(served: Served) -> None:
    there = RuntimeEndpoint(served.server.url)
    answers: list[object] = []

    async def several() -> None:
        states = await asyncio.gather(*(ask.run(backend=there) for _ in range(20)))
        answers.extend(state["answer"] for state in states)

    threads = [threading.Thread(target=asyncio.run, args=(several(),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["x"] * 100
    served.wait(lambda: served.server.connections == 0)


def test_closing_reaches_the_connections_of_other_loops(served: Served) -> None:
    there = RuntimeEndpoint(served.server.url)
    asked, closed = threading.Event(), threading.Event()

    async def elsewhere() -> None:
        await ask.run(backend=there)
        asked.set()
        await asyncio.to_thread(closed.wait)

    thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
    thread.start()
    assert asked.wait(10)

    async def close() -> None:
        await ask.run(backend=there)
        await there.aclose()
        await there.aclose()
        with pytest.raises(sgl.ClosedError):
            await ask.run(backend=there)

    asyncio.run(close())
    served.wait(lambda: served.server.connections == 0)
    closed.set()
    thread.join()


def test_a_loop_that_is_dropped_half_way(served: Served) -> None:
    """Tasks cancelled by the loop's end abort their requests, and nothing complains."""
    served.server.faults.append(Hang())
    there = RuntimeEndpoint(served.server.url)

    async def leave() -> None:
        task = asyncio.ensure_future(ask.run(backend=there))
        await asyncio.to_thread(served.wait, lambda: served.server.running == 1)
        assert not task.done()

    asyncio.run(leave())
    served.wait(lambda: served.server.running == 0)
    served.wait(lambda: served.server.connections == 0)
    assert asyncio.run(ask.run(backend=there))["answer"] == "x"


def test_a_script_that_closes_nothing_ends_quietly(served: Served) -> None:
    script = (
        "import asyncsgl.sync as sgl\n"
        "@sgl.function\n"
        "def ask(s):\n"
        "    s += 'Say' + sgl.gen('answer')\n"
        f"backend = sgl.RuntimeEndpoint({served.server.url!r})\n"
        "sgl.set_default_backend(backend)\n"
        "print(ask.run()['answer'], sgl.flush_cache())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'engine'}"},
    )
    assert (done.stdout, done.stderr, done.returncode) == ("x True\n", "", 0)


# -- utilities ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_utilities_of_a_server() -> None:
    async with FakeServer("x") as server, RuntimeEndpoint(server.url) as there:
        assert (await sgl.get_server_info(there))["incremental_streaming_output"] is False
        assert await sgl.flush_cache(there) is True
        with sgl.use_backend(there):
            assert await sgl.flush_cache() is True
            assert await sgl.start_profile(output_dir="/traces", num_steps=3) == "Start profiling."
            assert (await sgl.stop_profile()).startswith("Stop profiling.")
            await sgl.cache_prefix("Long")
    [profile] = [request for request in server.requests if request.path == "/start_profile"]
    assert profile.json == {"output_dir": "/traces", "num_steps": 3}


@pytest.mark.anyio
async def test_a_busy_cache_is_not_flushed() -> None:
    async with FakeServer(faults=[Hang()]) as server, RuntimeEndpoint(server.url) as there:
        task = asyncio.ensure_future(ask.run(backend=there))
        await server.until(lambda: server.running == 1)
        assert await sgl.flush_cache(there) is False
        assert await sgl.flush_cache(there, wait=True) is True
        assert server.requests[-1].path == "/flush_cache?timeout=540"
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.anyio
async def test_server_info_by_its_old_name_and_with_errors() -> None:
    async with FakeServer("x", old_names=True) as server, RuntimeEndpoint(server.url) as there:
        assert await sgl.get_server_info(there)
    async with FakeServer("x", api_key="k") as server, RuntimeEndpoint(server.url) as there:
        with pytest.raises(sgl.AuthenticationError):
            await sgl.get_server_info(there)
        with pytest.raises(sgl.AuthenticationError):
            await sgl.flush_cache(there)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "call", [sgl.get_server_info, sgl.flush_cache, sgl.start_profile, sgl.stop_profile]
)
async def test_backends_without_them_refuse(
    call: Callable[[sgl.Backend], Awaitable[object]],
) -> None:
    with pytest.raises(sgl.UnsupportedFeature, match=f"scripted does not support {call.__name__}"):
        await call(ScriptedBackend("x"))


@pytest.mark.anyio
async def test_no_backend_at_all() -> None:
    with pytest.raises(sgl.UsageError, match="no backend"):
        await sgl.get_server_info()


def test_the_blocking_facade(served: Served) -> None:
    there = blocking.RuntimeEndpoint(served.server.url)
    blocking.set_default_backend(there)
    try:
        assert blocking.function(ask).run()["answer"] == "x"
        assert blocking.get_server_info()["incremental_streaming_output"] is False
        assert blocking.flush_cache(there) is True
        assert blocking.start_profile() == "Start profiling."
        assert blocking.stop_profile().startswith("Stop")
        blocking.cache_prefix("Long")
        with pytest.raises(sgl.UnsupportedFeature):
            blocking.flush_cache(ScriptedBackend("x"))
    finally:
        blocking.set_default_backend(None)


@pytest.mark.anyio
async def test_retries_wait_without_holding_up_the_loop() -> None:
    faults = [Refuse(503, {"error": "full"})]
    async with FakeServer("x", faults=faults) as server, RuntimeEndpoint(server.url) as there:
        state = await ask.run(backend=there)
    assert state["answer"] == "x"
