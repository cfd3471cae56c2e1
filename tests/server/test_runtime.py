"""A Runtime that serves HTTP beside its programs."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

import asyncsgl as sgl

pytestmark = pytest.mark.anyio


def make(model: Path, **settings: Any) -> sgl.Runtime:
    options = {"num_threads": 1, "dtype": "float32", "max_total_tokens": 8192, **settings}
    return sgl.Runtime(str(model), **options)


def address(runtime: sgl.Runtime) -> str | None:
    return runtime.url


async def status(url: str) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.get(url)).status_code


@sgl.function
async def go_on(s: sgl.ProgramState) -> None:
    s += "Once upon a time"
    s += sgl.gen("story", max_tokens=8, temperature=0)


async def test_programs_and_clients_share_a_model(tiny_model: Path) -> None:
    body = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    runtime = make(tiny_model, serve=True)
    assert address(runtime) is None
    async with runtime:
        assert runtime.url is not None
        async with httpx.AsyncClient(base_url=runtime.url) as client:
            state, response = await asyncio.gather(
                go_on.run(backend=runtime), client.post("/generate", json=body)
            )
        assert state["story"] == response.json()["text"]
        url = runtime.url
    assert address(runtime) is None
    with pytest.raises(httpx.ConnectError):
        await status(url)


async def test_callers_of_start_get_one_server(tiny_model: Path) -> None:
    async with make(tiny_model, port=0) as runtime:
        await asyncio.gather(runtime.start(), runtime.start())
        assert await status(f"{runtime.url}/health") == 200


async def test_a_port_in_use_is_told_and_may_be_tried_again(tiny_model: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    runtime = make(tiny_model, port=port)
    try:
        with pytest.raises(sgl.InvalidArgument, match=f"port: cannot serve on .* port {port}"):
            await runtime.start()
        taken.close()
        await runtime.start()
        assert runtime.url == f"http://127.0.0.1:{port}"
    finally:
        taken.close()
        await runtime.aclose()


async def test_the_server_has_settings_of_its_own(tiny_model: Path) -> None:
    async with make(tiny_model, serve=True, server_settings={"api_key": "k"}) as runtime:
        assert await status(f"{runtime.url}/model_info") == 401
    with pytest.raises(sgl.InvalidArgument, match="no such setting"):
        make(tiny_model, serve=True, server_settings={"keys": 1})
    with pytest.raises(sgl.InvalidArgument, match="log_level"):
        make(tiny_model, serve=True, log_level="loud")
