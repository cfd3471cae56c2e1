"""A full server, asked from another process: how fast it refuses and what that costs it."""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from asyncsgl_engine.server import Address
from asyncsgl_engine.server.lifecycle import bind

from .process import SMALL, ServerProcess

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),  # a process imports torch before it serves
]

CAPACITY = 8
FULL = ("--max-running-requests", "4", "--max-queued-requests", "4")
LONG = {"text": "x", "sampling_params": {"max_new_tokens": 1800, "ignore_eos": True}}
QUICK_S = 0.010
MiB = 2**20


@pytest.fixture
async def full(
    start: Callable[..., ServerProcess], tiny_model: Path
) -> AsyncIterator[tuple[ServerProcess, aiohttp.ClientSession]]:
    """A server that runs and queues as much as it may, and a client of it."""
    command = ("asyncsgl", "serve", "--model", str(tiny_model), "--port", "0", "--no-batches")
    server = await asyncio.to_thread(start, *command, *SMALL, *FULL)
    async with AsyncExitStack() as stack:
        connector = aiohttp.TCPConnector(limit=0)
        session = aiohttp.ClientSession(server.url, connector=connector)
        await stack.enter_async_context(session)
        holders = [asyncio.ensure_future(held(session)) for _ in range(CAPACITY)]
        try:
            while (await refusal(session, b"{}"))[0] != 503:
                pass
            yield server, session
        finally:
            for holder in holders:
                holder.cancel()
            await asyncio.wait(holders)


async def held(session: aiohttp.ClientSession) -> None:
    """Keep one place taken for ever."""
    while True:
        async with session.post("/generate", json={**LONG, "stream": True}) as response:
            async for _ in response.content:
                pass


async def refusal(session: aiohttp.ClientSession, body: bytes) -> tuple[int, float]:
    """The status of an answer, and the seconds until it was there."""
    begun = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    async with session.post("/generate", data=io.BytesIO(body), headers=headers) as response:
        error = (await response.json())["error"]
        took = time.perf_counter() - begun
        if response.status == 503:
            assert "queue is full" in error["message"]
            assert int(response.headers["Retry-After"]) >= 1
        return response.status, took


async def flood(session: aiohttp.ClientSession, clients: int, each: int, body: bytes) -> None:
    """So many clients that ask so often, each as soon as it was refused."""

    async def ask() -> None:
        for _ in range(each):
            await refusal(session, body)

    await asyncio.gather(*(ask() for _ in range(clients)))


async def test_ten_times_as_many_clients_are_refused_within_ten_milliseconds(
    full: tuple[ServerProcess, aiohttp.ClientSession],
) -> None:
    _, session = full
    took: list[float] = []

    async def patient(number: int) -> None:
        chance = random.Random(number)
        for _ in range(3):
            await asyncio.sleep(chance.random())  # clients come when they come
            status, seconds = await refusal(session, json.dumps(LONG).encode())
            if status == 503:
                took.append(seconds)

    await asyncio.gather(*(patient(number) for number in range(10 * CAPACITY)))
    assert len(took) > 20 * CAPACITY
    assert statistics.median(took) < QUICK_S


async def test_memory_stays_flat_however_many_and_large_the_refused_are(
    full: tuple[ServerProcess, aiohttp.ClientSession],
) -> None:
    server, session = full
    body = json.dumps({**LONG, "text": "x" * MiB}).encode()
    await flood(session, 10 * CAPACITY, 2, body)
    # What is kept of refused bodies would grow with each round; an allocator's whims do not.
    grown: list[float] = []
    while len(grown) < 3 and not (grown and grown[-1] < 16):
        before = server.resident()
        await flood(session, 10 * CAPACITY, 10, body)
        grown.append(server.resident() - before)
    assert grown[-1] < 16, f"MiB after 800 MiB of refused bodies, by round: {grown}"


async def test_small_pieces_of_an_answer_are_not_held_back() -> None:
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        option = (socket.IPPROTO_TCP, socket.TCP_NODELAY)
        accepted.set_result(writer.get_extra_info("socket").getsockopt(*option))
        writer.close()

    listening = bind(Address(port=0))
    async with await asyncio.start_server(answer, sock=listening):
        _, writer = await asyncio.open_connection(*listening.getsockname()[:2])
        assert await accepted == 1
        writer.close()
        await writer.wait_closed()
