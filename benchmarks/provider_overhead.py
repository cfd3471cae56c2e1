"""What a chat call costs through the OpenAI backend, and through others on the same transport.

The service is a process of its own that answers after a fixed delay. The bare SDK runs beside the
backend; litellm and LangChain (``peers/openai_clients.py``) run in processes of their own, by the Python
that ``--peers`` names, as their dependencies clash with the newest SDK.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import openai
from aiohttp import web

import asyncsgl as sgl
from asyncsgl.types import Message

ROUNDS = 5
SDK = f"openai {openai.__version__}, aiohttp"
REPLY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world"},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
}


@sgl.function
async def ask(s: sgl.ProgramState, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=16))


async def serve(delay: float) -> None:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(delay)
        return web.json_response(REPLY)

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


async def bounded(call: Callable[[int], Awaitable[object]], calls: int, at_once: int) -> None:
    numbers = iter(range(calls))

    async def work() -> None:
        for number in numbers:
            await call(number)

    await asyncio.gather(*[work() for _ in range(at_once)])


class Cost(NamedTuple):
    """What one call took: seconds of CPU in the client, and of the clock for all calls."""

    cpu: float
    wall: float


async def measured(
    name: str, call: Callable[[int], Awaitable[object]], calls: int, at_once: int
) -> Cost:
    await bounded(call, at_once, at_once)  # connections are made
    used = resource.getrusage(resource.RUSAGE_SELF)
    began, cpu = time.perf_counter(), used.ru_utime + used.ru_stime
    await bounded(call, calls, at_once)
    wall = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    cost = Cost((used.ru_utime + used.ru_stime - cpu) / calls, wall)
    say(name, cost, calls)
    return cost


def say(name: str, cost: Cost, calls: int, more: str = "") -> None:
    each, rate = cost.cpu * 1000, calls / cost.wall
    print(f"{name:28} {each:6.2f} ms CPU a call {cost.wall:6.2f} s wall {rate:7.0f} calls/s {more}")


def peer(name: str, python: str, url: str, calls: int, at_once: int) -> Cost | None:
    """What another client costs, in a process of its own; None where it is not installed."""
    script = Path(__file__).parent / "peers" / "openai_clients.py"
    sizes = ["--calls", str(calls), "--concurrency", str(at_once)]
    done = subprocess.run(
        [python, str(script), name, url, *sizes], check=False, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"{name}: not measured: {last}")
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    cost = Cost(found["cpu"], found["wall"])
    say(name, cost, calls, found["versions"])
    return cost


async def main(port: int, calls: int, at_once: int, peers: str) -> None:
    url = f"http://127.0.0.1:{port}/v1"
    client = openai.AsyncOpenAI(
        api_key="x", base_url=url, max_retries=0, http_client=openai.DefaultAioHttpClient()
    )

    async def bare(number: int) -> object:
        return await client.chat.completions.create(
            model="gpt-4o",
            messages=[{"role": "user", "content": f"Question {number}"}],
            max_tokens=16,
        )

    async with sgl.OpenAI("gpt-4o", api_key="x", base_url=url, concurrency=at_once) as backend:

        async def generate(number: int) -> object:
            message = Message("user", (f"Question {number}",))
            sampling = sgl.SamplingParams(max_tokens=16)
            return await backend.generate(sgl.GenRequest((message,), sampling, f"gen-{number}"))

        async def program(number: int) -> object:
            return await ask.run(question=f"Question {number}", backend=backend)

        kinds = {SDK: bare, "asyncsgl backend": generate, "asyncsgl program": program}
        found: dict[str, list[Cost]] = {name: [] for name in kinds}
        for _ in range(ROUNDS):  # by turns, and the best of each: others use the machine, too
            for name, call in kinds.items():
                found[name].append(await measured(name, call, calls, at_once))
    await client.close()
    best = {name: min(costs) for name, costs in found.items()}
    for name in ("litellm", "langchain"):
        cost = await asyncio.to_thread(peer, name, peers, url, calls, at_once)
        if cost is not None:
            best[name] = cost
    base = best[SDK]
    print("\nbest of each; ratios to the SDK")
    for name, cost in best.items():
        say(name, cost, calls, f"CPU {cost.cpu / base.cpu:.2f}, wall {cost.wall / base.wall:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=500)
    parser.add_argument("--delay", type=float, default=0.02)
    parser.add_argument("--peers", default=sys.executable, help="the Python of the other clients")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.delay))
        sys.exit()
    command = [sys.executable, __file__, "--serve", "--delay", str(options.delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        try:
            port = int(service.stdout.readline())
            asyncio.run(main(port, options.calls, options.concurrency, options.peers))
        finally:
            service.kill()
