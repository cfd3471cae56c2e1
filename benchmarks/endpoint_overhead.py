"""What a program pays for a request to a server, beside bare loops of HTTP clients.

A loopback server in a process of its own answers every POST at once. In one run, for 50 and for
1,000 requests in flight: a bare loop of aiohttp, of httpx, of httpx on aiohttp's transport
(where ``httpx-aiohttp`` is installed), ``RuntimeEndpoint.generate``, and whole programs. For
each the CPU time a request in this process, and requests a second; medians of the rounds, of
which httpx, being slow, has only one.

    python benchmarks/endpoint_overhead.py [requests] [rounds]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import asyncsgl as sgl
from asyncsgl.program.prefix import prefix_request
from asyncsgl.types import SamplingParams

ANSWER = json.dumps(
    {
        "text": " The capital of Peru is Lima.",
        "output_ids": list(range(8)),
        "meta_info": {
            "id": "0" * 32,
            "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": 12,
            "completion_tokens": 8,
            "cached_tokens": 0,
            "e2e_latency": 0.001,
        },
    }
).encode()
PROMPT = "Question: what is the capital of Peru? Answer:"
Once = Callable[[], Awaitable[object]]


@sgl.function
async def ask(s: sgl.ProgramState) -> None:
    s += PROMPT
    s += sgl.gen("answer", max_tokens=16, temperature=0)


class Instant(asyncio.Protocol):
    """Answers each request on a connection as soon as it is there."""

    REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        len(ANSWER),
        ANSWER,
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._come = b""

    def data_received(self, data: bytes) -> None:
        self._come += data
        while (end := self._come.find(b"\r\n\r\n")) >= 0:
            head = self._come[:end].lower()
            _, found, rest = head.partition(b"content-length:")
            size = int(rest.split(b"\r\n", 1)[0]) if found else 0
            if len(self._come) < end + 4 + size:
                return
            self._come = self._come[end + 4 + size :]
            self._transport.write(self.REPLY)


async def serve() -> None:
    """Listen on a free port, say which, and go on for ever."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Instant, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def body() -> bytes:
    """What the bare loops send."""
    sampling = {"max_new_tokens": 16, "temperature": 0}
    return json.dumps({"text": PROMPT, "sampling_params": sampling, "rid": "0" * 32}).encode()


@asynccontextmanager
async def bare_aiohttp(url: str) -> AsyncIterator[Once]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def once() -> object:
            async with session.post(f"{url}/generate", data=body()) as response:
                return json.loads(await response.read())["text"]

        yield once


@asynccontextmanager
async def bare_httpx(url: str) -> AsyncIterator[Once]:
    import httpx

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:

        async def once() -> object:
            return (await client.post(f"{url}/generate", content=body())).json()["text"]

        yield once


@asynccontextmanager
async def httpx_on_aiohttp(url: str) -> AsyncIterator[Once]:
    import aiohttp
    import httpx
    from httpx_aiohttp import AiohttpTransport

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        transport = AiohttpTransport(client=session)
        async with httpx.AsyncClient(transport=transport, timeout=None) as client:

            async def once() -> object:
                return (await client.post(f"{url}/generate", content=body())).json()["text"]

            yield once


@asynccontextmanager
async def endpoint_calls(url: str) -> AsyncIterator[Once]:
    sampling = SamplingParams(max_tokens=16, temperature=0)
    request = replace(prefix_request(PROMPT), sampling=sampling)
    async with sgl.RuntimeEndpoint(url, max_connections=2000) as backend:
        yield lambda: backend.generate(request)


@asynccontextmanager
async def programs(url: str) -> AsyncIterator[Once]:
    async with sgl.RuntimeEndpoint(url, max_connections=2000) as backend:
        yield lambda: ask.run(backend=backend)


WAYS = {
    "aiohttp, bare": bare_aiohttp,
    "httpx, bare": bare_httpx,
    "httpx on aiohttp, bare": httpx_on_aiohttp,
    "RuntimeEndpoint.generate": endpoint_calls,
    "programs": programs,
}


async def measured(once: Once, requests: int, in_flight: int) -> tuple[float, float]:
    """CPU microseconds a request, and requests a second."""
    left = iter(range(requests))

    async def worker() -> None:
        for _ in left:
            await once()

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / requests * 1e6, requests / wall


async def compare(url: str, requests: int, rounds: int, in_flight: int) -> None:
    """Print a table; the ways take turns, so that noise hits all of them."""
    found: dict[str, list[tuple[float, float]]] = {}
    async with AsyncExitStack() as stack:
        ways: dict[str, Once] = {}
        for name, way in WAYS.items():
            try:
                ways[name] = await stack.enter_async_context(way(url))
            except ImportError:
                continue
        for number in range(rounds):
            for name, once in ways.items():
                slow = name == "httpx, bare"
                if slow and number:
                    continue
                few = 2 * in_flight if slow else requests
                await measured(once, in_flight, in_flight)  # open the connections
                found.setdefault(name, []).append(await measured(once, few, in_flight))
    middle = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    _, best = middle["aiohttp, bare"]
    print(f"\n{in_flight} in flight: CPU a request, requests a second, ratio to bare aiohttp")
    for name, (cpu, rate) in middle.items():
        print(f"  {name:26} {cpu:8.0f} us {rate:8.0f} /s {rate / best:6.2f}")


def main() -> None:
    requests, rounds = [*map(int, sys.argv[1:]), *(5000, 3)[len(sys.argv) - 1 :]]
    server = subprocess.Popen(
        [sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        for in_flight in (50, 1000):
            asyncio.run(compare(url, requests, rounds, in_flight))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve())
    else:
        main()
