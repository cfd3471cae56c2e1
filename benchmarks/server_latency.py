"""What HTTP adds: first token and gaps between tokens, served and in the same process.

Run: python benchmarks/server_latency.py [--clients 16] [--requests 64] [--tokens 64]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.server import Address, ServerSettings, create_app
from asyncsgl_engine.server.lifecycle import BackgroundServer

Ask = Callable[[int], AsyncIterator[object]]


@dataclass
class Times:
    """Seconds to the first piece and between pieces."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        cells = [name.ljust(12)]
        for values in (self.first, self.gaps):
            cuts = statistics.quantiles(values, n=100)
            cells += [f"{1000 * cuts[49]:8.1f}", f"{1000 * cuts[98]:8.1f}"]
        return " ".join(cells)


async def measured(ask: Ask, requests: int, clients: int) -> Times:
    """Ask as often, so many at a time."""
    times = Times()
    slots = asyncio.Semaphore(clients)

    async def one(number: int) -> None:
        async with slots:
            last = time.perf_counter()
            first = True
            async for _ in ask(number):
                now = time.perf_counter()
                (times.first if first else times.gaps).append(now - last)
                last, first = now, False

    await asyncio.gather(*(one(number) for number in range(requests)))
    return times


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    chance = random.Random(0)
    prompts = [[chance.randrange(1000, 40000) for _ in range(64)] for _ in range(given.requests)]
    async with AsyncEngine(EngineConfig(disable_radix_cache=True)) as engine:
        server = BackgroundServer(create_app(engine, ServerSettings()), Address(port=0))
        url = await server.start()
        limits = httpx.Limits(max_connections=given.clients)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

            async def direct(number: int) -> AsyncIterator[object]:
                sampling = Sampling(max_new_tokens=given.tokens, ignore_eos=True)
                name = f"direct-{number}-{time.perf_counter_ns()}"
                request = Request(name, tuple(prompts[number]), sampling, stream=True)
                async for delta in engine.stream(request):
                    yield delta

            async def served(number: int) -> AsyncIterator[object]:
                params = {"max_new_tokens": given.tokens, "ignore_eos": True}
                body = {"input_ids": prompts[number], "sampling_params": params, "stream": True}
                async with client.stream("POST", "/generate", json=body) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            yield line

            await measured(direct, 4, 4)
            print("ms            first p50      p99  gap p50      p99")
            for name, ask in (("in process", direct), ("served", served)):
                times = await measured(ask, given.requests, given.clients)
                print(times.row(name))
        await asyncio.to_thread(server.stop)


if __name__ == "__main__":
    asyncio.run(main())
