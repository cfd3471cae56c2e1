"""What the server refuses, and who may ask: queues, bodies, deadlines, keys, clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from .conftest import Serve, Served
from .test_control import last_event, started

pytestmark = pytest.mark.anyio

LONG = {"text": "Once upon", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
SMALL = {"max_running_requests": 2, "max_queued_requests": 2}


async def in_engine(client: httpx.AsyncClient, count: int) -> None:
    """Return when the engine has as many requests; each question takes it a step further."""
    while (await client.get("/v1/loads")).json()["loads"][0]["num_total_reqs"] != count:
        pass


# -- overload -------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_at_once_and_serves_the_others(serve: Serve) -> None:
    served = await asyncio.to_thread(serve, engine=SMALL)
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        streams = [await started(client, "a"), await started(client, "b")]
        waiting = [
            asyncio.ensure_future(client.post("/generate", json={**LONG, "rid": f"w{index}"}))
            for index in range(2)
        ]
        await in_engine(client, 4)
        took = []
        for _ in range(40):
            begun = time.perf_counter()
            response = await client.post("/generate", json=LONG)
            took.append(time.perf_counter() - begun)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert "queue is full" in response.json()["error"]["message"]
        assert min(took) < 0.010
        await client.post("/abort_request", json={"abort_all": True})
        for each in (*[last_event(stream) for stream in streams], *waiting):
            assert await each
        assert (await client.post("/generate", json={"text": "x"})).status_code == 200
    await asyncio.to_thread(served.assert_idle)


async def test_a_list_that_is_longer_than_the_queue_is_refused_whole(serve: Serve) -> None:
    served = await asyncio.to_thread(serve, engine=SMALL)
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        response = await client.post("/generate", json={**LONG, "text": ["x"] * 50})
        assert response.status_code == 503
    await asyncio.to_thread(served.assert_idle)


# -- clients that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
async def test_who_leaves_a_stream_leaves_the_batch(served: Served, count: int) -> None:
    before = served.engine.statistics()
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        body = {**LONG, "text": ["Once upon"] * count, "stream": True}
        async with client.stream("POST", "/generate", json=body) as response:
            await anext(response.aiter_lines())
    await asyncio.to_thread(served.assert_idle)
    after = served.engine.statistics()
    assert after.aborted - before.aborted == count
    assert after.generated_tokens - before.generated_tokens < 1500 * count


async def test_who_leaves_an_answer_leaves_the_batch(served: Served) -> None:
    before = served.engine.statistics()
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        answer = asyncio.ensure_future(client.post("/generate", json=LONG))
        await in_engine(client, 1)
        answer.cancel()
        await asyncio.wait([answer])
    await asyncio.to_thread(served.assert_idle)
    after = served.engine.statistics()
    assert after.aborted - before.aborted == 1
    assert after.generated_tokens - before.generated_tokens < 1500


async def test_who_leaves_the_queue_never_runs(serve: Serve) -> None:
    served = await asyncio.to_thread(serve, engine={"max_running_requests": 1})
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        stream = await started(client, "runs")
        answer = asyncio.ensure_future(client.post("/generate", json=LONG))
        await in_engine(client, 2)
        answer.cancel()
        await asyncio.wait([answer])
        await in_engine(client, 1)
        assert served.engine.statistics().prompt_tokens == 2  # of the one that runs
        await stream.aclose()
    await asyncio.to_thread(served.assert_idle)


async def test_clients_that_come_and_go_leave_nothing(served: Served) -> None:
    async def visit(number: int) -> None:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=served.url))
            body = {**LONG, "text": f"{number} times", "stream": True}
            response = await stack.enter_async_context(
                client.stream("POST", "/generate", json=body, timeout=60)
            )
            lines = response.aiter_lines()
            for _ in range(number % 7):
                await anext(lines)

    await asyncio.gather(*(visit(number) for number in range(40)))
    await asyncio.to_thread(served.assert_idle)


# -- bodies and deadlines -------------------------------------------------------------------------


async def test_a_large_body_is_refused_with_and_without_its_length(serve: Serve) -> None:
    served = await asyncio.to_thread(serve, max_request_body=1000)

    async def drip() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        for content in (b" " * 1001, drip()):
            response = await client.post("/generate", content=content)
            assert response.status_code == 413
            assert "larger than 1000 bytes" in response.json()["error"]["message"]
        assert (await client.post("/generate", json={"text": "x"})).status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    served = await asyncio.to_thread(serve, body_timeout=0.2)
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()


async def test_a_deadline_ends_a_request(serve: Serve) -> None:
    served = await asyncio.to_thread(serve, request_timeout=60)
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        headers = {"X-Request-Timeout": "0.05"}
        late = await client.post("/generate", json=LONG, headers=headers)
        assert late.status_code == 504
        assert "deadline" in late.json()["error"]["message"]
        bad = await client.post("/generate", json=LONG, headers={"X-Request-Timeout": "-1"})
        assert bad.status_code == 400
        headers = {"X-Request-Timeout": "0.3"}
        body = {**LONG, "stream": True}
        async with client.stream("POST", "/generate", json=body, headers=headers) as stream:
            lines = [line async for line in stream.aiter_lines() if line]
        assert '"code":504' in lines[-2]
        assert lines[-1] == "data: [DONE]"
    await asyncio.to_thread(served.assert_idle)


# -- keys -----------------------------------------------------------------------------------------

OPEN = ("/health", "/ready", "/metrics", "/")
NORMAL = ("/model_info", "/server_info", "/v1/models", "/v1/loads", "/openapi.json", "/docs")
ADMIN = ("/flush_cache",)


@pytest.mark.parametrize(
    ("keys", "given", "refused"),
    [
        ({}, None, ()),
        ({"api_key": "k"}, None, NORMAL + ADMIN),
        ({"api_key": "k"}, "k", ()),
        ({"api_key": "k"}, "K", NORMAL + ADMIN),
        ({"api_key": "k", "admin_api_key": "a"}, "k", ADMIN),
        ({"api_key": "k", "admin_api_key": "a"}, "a", ()),
        ({"admin_api_key": "a"}, None, ADMIN),
        ({"admin_api_key": "a"}, "a", ()),
        ({"api_key": "ключ"}, "ключ", ()),
    ],
)
async def test_keys_open_their_routes(
    serve: Serve, keys: dict[str, str], given: str | None, refused: tuple[str, ...]
) -> None:
    served = await asyncio.to_thread(serve, **keys)
    headers = [] if given is None else [(b"Authorization", f"Bearer {given}".encode())]
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60) as client:
        for path in (*OPEN, *NORMAL, *ADMIN):
            response = await client.get(path)
            assert (response.status_code == 401) == (path in refused), path
            if path in refused:
                assert response.json()["error"]["type"] == "AuthenticationError"
        assert (await client.options("/model_info")).status_code != 401


async def test_a_key_is_asked_for_before_a_body_is_read(serve: Serve) -> None:
    served = await asyncio.to_thread(serve, api_key="k", max_request_body=10)
    async with httpx.AsyncClient(base_url=served.url) as client:
        response = await client.post("/generate", content=b" " * 1000)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        for header in ("k", "Basic k", "Bearer"):
            response = await client.get("/model_info", headers={"Authorization": header})
            assert response.status_code == 401


# -- patterns that would take everything ----------------------------------------------------------


async def test_a_pattern_of_one_client_harms_no_other(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        nested = {"max_new_tokens": 4, "stop_regex": "(?:(?:(?:a{9999}){9999}){9999}){9999}b"}
        refused = await client.post("/generate", json={"text": "x", "sampling_params": nested})
        assert refused.status_code == 400
        assert "repeat less" in refused.json()["message"]
        endless = {
            "max_new_tokens": 200,
            "ignore_eos": True,
            "regex": "a{150}b",
            "stop_regex": "(?:a|aa)+c",
        }
        other = asyncio.ensure_future(client.post("/generate", json={**LONG, "text": "The sea"}))
        failed = await client.post("/generate", json={"text": "x", "sampling_params": endless})
        assert failed.status_code == 400
        assert "takes too long" in failed.json()["message"]
        assert (await other).json()["meta_info"]["completion_tokens"] == 1500
    await asyncio.to_thread(served.assert_idle)
