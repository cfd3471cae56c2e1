"""Two minutes of clients, a third of whom leave at random."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from asyncsgl_engine.server import ServerSettings

from .conftest import Served, serving, tiny_engine

pytestmark = [pytest.mark.anyio, pytest.mark.soak]

CLIENTS = 64
SECONDS = float(os.environ.get("ASYNCSGL_SOAK_SECONDS", "120"))
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def busy(tiny_model: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        engine = tiny_engine(tiny_model, max_total_tokens=4096, max_running_requests=16)
        yield serving(stack, engine, ServerSettings())


def resident() -> float:
    """Memory of this process in MiB, without what malloc keeps for the next who asks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


async def visit(client: httpx.AsyncClient, chance: random.Random) -> str:
    """One request, and how it ended."""
    params = {"max_new_tokens": chance.randint(1, 200), "ignore_eos": True}
    text = "Once upon a time " * chance.randint(1, 30) + str(chance.random())
    body = {"text": text, "sampling_params": params, "stream": chance.random() < 0.6}
    patience = chance.uniform(0, 0.5) if chance.random() < 1 / 3 else None
    try:
        async with asyncio.timeout(patience), client.stream("POST", "/generate", json=body) as got:
            await got.aread()
            return str(got.status_code)
    except TimeoutError:
        return "left"


async def test_clients_that_leave_cost_nothing(busy: Served) -> None:
    ends: dict[str, int] = {}
    memory: list[float] = []
    until = time.monotonic() + SECONDS
    limits = httpx.Limits(max_connections=CLIENTS)

    async def live(number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=busy.url, timeout=120, limits=limits) as client:
            while time.monotonic() < until:
                end = await visit(client, chance)
                ends[end] = ends.get(end, 0) + 1
                if number == 0:
                    memory.append(await asyncio.to_thread(resident))

    await asyncio.gather(*(live(number) for number in range(CLIENTS)))
    await asyncio.to_thread(busy.assert_idle)
    now = busy.engine.statistics()
    third = len(memory) // 3
    early, late = max(memory[third // 2 : third]), max(memory[-third:])
    print(
        f"\n{ends}; {now.aborted} aborted, {now.preemptions} preempted; {early:.0f}→{late:.0f} MiB"
    )
    assert set(ends) <= {"200", "left"}
    assert now.aborted <= ends["left"]
    assert late < early + 20
    async with httpx.AsyncClient(base_url=busy.url) as client:
        text = (await client.get("/metrics")).text
    assert f'sglang:num_running_reqs{{model_name="{busy.engine.asked.model_path}"}} 0.0' in text
