"""How fast a full server refuses: ten times as many clients as it takes, in their own process.

``asyncsgl serve`` runs in a process of its own and takes so many requests at once. Ten times
as many clients ask; who is refused comes back after about the time that the answer names, who
is served asks again. Printed are the times of the refusals, of some ordinary questions asked
meanwhile, and the server's memory, before, in the middle and at the end.

Run: python benchmarks/server_overload.py [--seconds 20] [--capacity 16] [--body 0] [--model …]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

FACTOR = 10


@dataclass
class Seen:
    """What the clients met: seconds of each refusal and question, and tokens that were made."""

    refusals: list[float] = field(default_factory=list)
    questions: list[float] = field(default_factory=list)
    answers: int = 0
    tokens: int = 0


@asynccontextmanager
async def server(model: str | None, capacity: int) -> AsyncIterator[tuple[str, int]]:
    """The URL and the process id of a server that lets so many requests in."""
    half = str(capacity // 2)
    command = [sys.executable, "-m", "asyncsgl", "serve", "--port", "0", "--no-batches"]
    command += ["--max-running-requests", half, "--max-queued-requests", half]
    command += ["--model", model] if model else []
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        while b"ready on" not in (line := await process.stderr.readline()):
            if not line:
                raise RuntimeError("the server ended before it was ready")
        yield line.split(b"ready on ")[1].split()[0].decode(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()


def resident(process: int) -> float:
    """MiB of memory that a process holds."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def client(session: aiohttp.ClientSession, number: int, body: int, seen: Seen) -> None:
    """Ask for ever; come back after a refusal when the server says so, more or less."""
    chance = random.Random(number)
    params = {"max_new_tokens": 64, "ignore_eos": True}
    asked = {"text": f"Client {number} says" + " x" * (body // 2), "sampling_params": params}
    await asyncio.sleep(chance.random())
    while True:
        begun = time.perf_counter()
        async with session.post("/generate", json=asked) as response:
            answer = await response.json()
        if response.status == 200:
            seen.answers += 1
            seen.tokens += answer["meta_info"]["completion_tokens"]
            continue
        assert response.status == 503, answer
        seen.refusals.append(time.perf_counter() - begun)
        await asyncio.sleep(float(response.headers["Retry-After"]) * chance.uniform(0.5, 1.5))


async def curious(session: aiohttp.ClientSession, seen: Seen) -> None:
    """Ask how busy it is, ten times a second."""
    while True:
        begun = time.perf_counter()
        async with session.get("/v1/loads") as response:
            await response.read()
        seen.questions.append(time.perf_counter() - begun)
        await asyncio.sleep(0.1)


def row(name: str, values: list[float]) -> str:
    cuts = [1000 * cut for cut in statistics.quantiles(values, n=100)]
    return f"{name:12}{len(values):8}" + "".join(f"{cuts[at]:9.1f}" for at in (49, 89, 98))


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--capacity", type=int, default=16)
    parser.add_argument("--body", type=int, default=0, help="bytes of each prompt, about")
    parser.add_argument("--model")
    given = parser.parse_args()
    async with server(given.model, given.capacity) as (url, process):
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        async with aiohttp.ClientSession(url, connector=connector) as session:
            seen, memory = Seen(), [resident(process)]
            clients = [
                asyncio.ensure_future(client(session, number, given.body, seen))
                for number in range(FACTOR * given.capacity)
            ]
            clients.append(asyncio.ensure_future(curious(session, seen)))
            for _ in range(2):
                await asyncio.wait(
                    clients, timeout=given.seconds / 2, return_when=asyncio.FIRST_COMPLETED
                )
                memory.append(resident(process))
            for each in clients:
                each.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    print(f"{'ms':12}{'count':>8}{'p50':>9}{'p90':>9}{'p99':>9}")
    print(row("refused", seen.refusals))
    print(row("/v1/loads", seen.questions))
    print(f"served {seen.answers}, {seen.tokens / given.seconds:.0f} tokens/s")
    print("MiB of the server: " + " → ".join(f"{each:.0f}" for each in memory))


if __name__ == "__main__":
    asyncio.run(main())
