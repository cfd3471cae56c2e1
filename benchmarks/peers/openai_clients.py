"""One other client against a running service: what ``provider_overhead.py`` compares with.

It needs nothing of asyncsgl, so that each client can be measured in an environment of its own:
``python benchmarks/peers/openai_clients.py litellm http://127.0.0.1:PORT/v1 --calls 2000``. The last
line that it prints is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

Run = Callable[[int], Awaitable[object]]
"""Makes so many calls, as many at once as was said."""


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Question {number}"}]


def with_litellm(url: str, at_once: int) -> Run:
    """``litellm.acompletion``, with its own retries off."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    litellm: Any = import_module("litellm")
    litellm.suppress_debug_info = True

    async def run(calls: int) -> None:
        numbers = iter(range(calls))

        async def work() -> None:
            for number in numbers:
                await litellm.acompletion(
                    model="openai/gpt-4o",
                    messages=messages(number),
                    max_tokens=16,
                    api_base=url,
                    api_key="x",
                    max_retries=0,
                    num_retries=0,
                )

        await asyncio.gather(*[work() for _ in range(at_once)])

    return run


def with_langchain(url: str, at_once: int) -> Run:
    """``ChatOpenAI.abatch``, on the OpenAI SDK's aiohttp transport as the others are."""
    openai: Any = import_module("openai")
    model: Any = import_module("langchain_openai").ChatOpenAI(
        model="gpt-4o",
        base_url=url,
        api_key="x",
        max_retries=0,
        max_tokens=16,
        http_async_client=openai.DefaultAioHttpClient(),
    )

    async def run(calls: int) -> None:
        questions = [f"Question {number}" for number in range(calls)]
        await model.abatch(questions, config={"max_concurrency": at_once})

    return run


PEERS: dict[str, tuple[Callable[[str, int], Run], tuple[str, ...]]] = {
    "litellm": (with_litellm, ("litellm", "openai")),
    "langchain": (with_langchain, ("langchain-openai", "langchain-core", "openai")),
}


async def measured(run: Run, calls: int, at_once: int) -> dict[str, float]:
    await run(at_once)  # connections are made, and what is imported late
    used = resource.getrusage(resource.RUSAGE_SELF)
    began, cpu = time.perf_counter(), used.ru_utime + used.ru_stime
    await run(calls)
    wall = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": (used.ru_utime + used.ru_stime - cpu) / calls, "wall": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("url")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    make, distributions = PEERS[options.peer]

    async def rounds() -> list[dict[str, float]]:
        run = make(options.url, options.concurrency)
        return [
            await measured(run, options.calls, options.concurrency) for _ in range(options.rounds)
        ]

    found = asyncio.run(rounds())
    versions = ", ".join(f"{name} {version(name)}" for name in distributions)
    best = min(found, key=lambda one: one["cpu"])
    print(json.dumps({**best, "versions": versions}))
    sys.stdout.flush()
    os._exit(0)  # litellm's workers would take seconds to end


if __name__ == "__main__":
    main()
