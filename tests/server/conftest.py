"""A server on a real socket: a tiny random Llama with the default model's tokenizer."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.hub import DEFAULT_MODEL, resolve_model
from asyncsgl_engine.server import Address, ServerSettings, create_app
from asyncsgl_engine.server.lifecycle import BackgroundServer

from .process import ServerProcess

CONTEXT = 2048
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Served:
    """An engine behind a socket."""

    url: str
    engine: AsyncEngine
    stop: Callable[[], None]

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Post JSON."""
        return httpx.post(self.url + path, json=body, timeout=60)

    def get(self, path: str) -> httpx.Response:
        """Get something."""
        return httpx.get(self.url + path, timeout=60)

    def generate(self, text: object = "Once upon a time", **body: Any) -> Any:
        """What `/generate` answers; sampling is greedy unless the body says so."""
        params = body.pop("sampling_params", {"max_new_tokens": 8, "temperature": 0})
        response = self.post("/generate", text=text, sampling_params=params, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def assert_idle(self) -> None:
        """No request is in the engine and no page is lost, as soon as running steps end."""
        asyncio.run(self._assert_idle())

    async def _assert_idle(self) -> None:
        await self.engine.flush_cache(wait=True)
        await self.engine.check()
        now = self.engine.statistics()
        assert (now.running, now.waiting, now.pages_held) == (0, 0, 0)
        assert now.pages_free == now.pages_total


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with the default model's tokenizer."""
    source = resolve_model(DEFAULT_MODEL).path
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(11)
    config: Any = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    return folder


def tiny_engine(model: Path, **config: Any) -> AsyncEngine:
    """An engine that takes one core."""
    settings = {"num_threads": 1, "max_total_tokens": 16384, "dtype": "float32", **config}
    return AsyncEngine(EngineConfig(model_path=str(model), **settings))


def serving(stack: ExitStack, engine: AsyncEngine, settings: ServerSettings) -> Served:
    """Serve an engine until the stack is left."""
    stack.callback(engine.shutdown)
    server = BackgroundServer(create_app(engine, settings), Address(port=0))
    stack.callback(server.stop)
    return Served(asyncio.run(server.start()), engine, server.stop)


@pytest.fixture(scope="session")
def served(tiny_model: Path) -> Iterator[Served]:
    """The server that most tests share."""
    with ExitStack() as stack:
        settings = ServerSettings(served_model_name="tiny")
        yield serving(stack, tiny_engine(tiny_model), settings)


@pytest.fixture
def serve(tiny_model: Path) -> Iterator[Serve]:
    """Starts a server of one's own: `serve(engine={...}, **settings)`."""
    with ExitStack() as stack:

        def start(engine: dict[str, Any] | None = None, **settings: Any) -> Served:
            made = tiny_engine(tiny_model, **(engine or {}))
            return serving(stack, made, ServerSettings(**settings))

        yield start


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """Starts `python -m COMMAND…`."""
    servers: list[ServerProcess] = []

    def begin(*command: str) -> ServerProcess:
        servers.append(ServerProcess(*command))
        return servers[-1]

    yield begin
    for server in servers:
        server.process.kill()
        server.process.wait()
        server.stderr.close()
