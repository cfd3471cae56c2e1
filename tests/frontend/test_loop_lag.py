"""Two thousand live programs leave the event loop responsive."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator

import pytest

import asyncsgl as sgl
from asyncsgl.testing import ScriptedBackend

pytestmark = pytest.mark.anyio

PROGRAMS = 2000
PACE = 0.5
LIMIT = 0.020
TRIES = 4  # a neighbour that empties the caches makes the same work slower


@pytest.fixture
def only_our_garbage() -> Iterator[None]:
    """Keeps the collector from walking what other tests have loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@sgl.function
async def story(s: sgl.ProgramState) -> None:
    s += sgl.user("Tell.")
    s += sgl.assistant(sgl.gen("story"))


async def lags(until: asyncio.Task[object]) -> list[float]:
    """How late a sleeper of 5 ms wakes, again and again, as far as the loop's work explains it.

    Where other processes hold the CPU the loop is late without having worked, so that only as
    much counts as the loop's thread has worked meanwhile.
    """
    late = []
    while not until.done():
        began, worked = time.perf_counter(), time.thread_time()
        await asyncio.sleep(0.005)
        late.append(min(time.perf_counter() - began - 0.005, time.thread_time() - worked))
    return late


async def measured() -> float:
    """The 99th percentile of the lag, with programs that get a piece every ``PACE`` seconds."""
    backend = ScriptedBackend("word " * 10, chunk_size=5, chunk_delay=PACE)

    async def watch(number: int) -> None:
        await asyncio.sleep(2 * number / PROGRAMS)
        async with story.stream(backend=backend) as run:
            async for _ in run.text("story"):
                pass

    async def all_of_them() -> object:
        return await asyncio.gather(*(watch(number) for number in range(PROGRAMS)))

    late = sorted(await lags(asyncio.create_task(all_of_them())))
    assert len(backend.requests) == PROGRAMS
    return late[int(len(late) * 0.99)]


@pytest.mark.timeout(90)
async def test_the_loop_lags_under_20_ms(only_our_garbage: None) -> None:
    lags_seen = [await measured()]
    while min(lags_seen) >= LIMIT and len(lags_seen) < TRIES:
        lags_seen.append(await measured())
    assert min(lags_seen) < LIMIT, f"p99 in seconds, {TRIES} tries: {lags_seen}"
