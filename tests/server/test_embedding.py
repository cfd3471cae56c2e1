"""The engine in somebody else's FastAPI app: the example, and the server mounted."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

import asyncsgl as sgl
from asyncsgl_engine.server import ServerSettings, create_app

from .conftest import tiny_engine

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_app.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_fastapi_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server(uvicorn.Server):
    """Uvicorn that tells when it answers."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_level="error", ws="none"))
        self.answering = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app on a real socket."""
    server = Server(app)
    task = asyncio.ensure_future(server.serve())
    await server.answering.wait()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def test_the_example_answers_and_stops_for_who_leaves(tiny_model: Path) -> None:
    runtime = sgl.Runtime(str(tiny_model), num_threads=1, dtype="float32", max_total_tokens=8192)
    app = await asyncio.to_thread(lambda: example().make_app(runtime))
    async with client_of(app) as client:
        answer = await client.get("/tell", params={"topic": "bread", "length": 5})
        assert answer.json()["text"]
        for length in (-3, 10**6):
            refused = await client.get("/tell", params={"topic": "bread", "length": length})
            assert refused.status_code == 422
        before = runtime.statistics()
        parameters: dict[str, Any] = {"topic": "bread", "length": 1500}
        async with client.stream("GET", "/stream", params=parameters) as stream:
            await anext(stream.aiter_text())
        assert await runtime.flush_cache(wait=True)
        after = runtime.statistics()
        assert after["pages_held"] == 0
        assert after["aborted"] == before["aborted"] + 1
        assert after["generated_tokens"] - before["generated_tokens"] < 1500


async def test_a_mounted_server_starts_its_engine_when_first_asked(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    app = FastAPI()
    app.mount("/llm", create_app(engine, ServerSettings(api_key="k")))
    try:
        async with client_of(app) as client:
            assert (await client.get("/llm/ready")).status_code == 503
            assert (await client.get("/llm/v1/models")).status_code == 401
            client.headers["Authorization"] = "Bearer k"
            body = {"text": "Once upon", "sampling_params": {"max_new_tokens": 3}}
            answer = await client.post("/llm/generate", json=body)
            assert answer.json()["meta_info"]["completion_tokens"] >= 1
            assert (await client.get("/llm/ready")).status_code == 200
            assert (await client.get("/llm/v1/batches")).status_code == 501
            assert (await client.get("/llm/")).status_code == 200
    finally:
        await engine.aclose()
