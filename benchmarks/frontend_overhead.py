"""What a program costs beside its model calls: CPU, memory and wall time of 10,000 at once.

Each program has a turn, a text and one generation on the scripted backend. The figures stand
beside a bare ``asyncio.gather`` of coroutines that only sleep as long, in the same process.

Run: ``python benchmarks/frontend_overhead.py [--programs 10000] [--repeats 5]``
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncsgl as sgl
from asyncsgl.testing import ScriptedBackend

Work = Callable[[int], Awaitable[object]]


@sgl.function
async def ask(s: sgl.ProgramState, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer"))


@dataclass(frozen=True, slots=True)
class Figures:
    """Best of several rounds: seconds of CPU and wall; bytes at the peak, of one round."""

    cpu: float
    wall: float
    peak: int


def programs(delay: float) -> Work:
    backend = ScriptedBackend("Paris", delay=delay)

    async def run(count: int) -> None:
        backend.requests.clear()
        await asyncio.gather(*(ask.run(question="Where?", backend=backend) for _ in range(count)))

    return run


def sleepers(delay: float) -> Work:
    async def run(count: int) -> None:
        await asyncio.gather(*(asyncio.sleep(delay) for _ in range(count)))

    return run


def measure(work: Work, count: int, repeats: int) -> Figures:
    cpu, wall = [], []
    for _ in range(repeats):
        gc.collect()
        began, spent = time.perf_counter(), time.process_time()
        asyncio.run(_awaited(work, count))
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - spent)
    gc.collect()
    tracemalloc.start()
    asyncio.run(_awaited(work, count))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Figures(min(cpu), min(wall), peak)


async def _awaited(work: Work, count: int) -> None:
    await work(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    count, repeats = options.programs, options.repeats
    print(f"{count:,} at once, best of {repeats}")
    print(f"{'':24}{'CPU µs each':>14}{'KiB each':>12}{'wall s':>10}")
    for delay in (0.0, 0.05):
        for name, work in (("bare sleepers", sleepers(delay)), ("programs", programs(delay))):
            figures = measure(work, count, repeats)
            label = f"{name}, {delay * 1000:g} ms"
            cpu, memory = figures.cpu / count * 1e6, figures.peak / count / 1024
            print(f"{label:24}{cpu:>14.1f}{memory:>12.2f}{figures.wall:>10.2f}")


if __name__ == "__main__":
    main()
