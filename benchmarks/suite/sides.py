"""Where the programs run: our engine with and without its prefix cache, or vLLM's server."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import asyncsgl as sgl
from benchmarks.suite.programs import SCHEMA

__all__ = ["Side", "local", "vllm"]

_START_LIMIT_S = 600.0
_SERVED_AS = "bench"


@dataclass
class Side:
    """A place to run programs on.

    Args:
        name: for the table.
        backend: for programs without a constraint.
        constrained: for those that follow `SCHEMA`, and whether the program has to name it.
        defaults: sampling that every run gets.
        counters: where to read prompt tokens and cached tokens since the start.
        pids: processes that belong to it, besides this one.
    """

    name: str
    backend: sgl.Backend
    constrained: tuple[sgl.Backend, bool]
    defaults: Mapping[str, Any]
    url: str | None = None
    pids: list[int] = field(default_factory=list)

    async def prompt_and_cached(self) -> tuple[float, float]:
        """Prompt tokens asked for and those found in the cache, since the start."""
        if self.url is None:
            counted = self.backend.statistics()
            return counted["prompt_tokens"], counted["cached_tokens"]
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            page = (await client.get(f"{self.url}/metrics")).text
        return _metric(page, "queries"), _metric(page, "hits")

    async def flush(self) -> None:
        """Empty the prefix cache, where that can be asked for."""
        if self.url is None:
            await self.backend.flush_cache(wait=True)


def _metric(page: str, name: str) -> float:
    found = re.search(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


@asynccontextmanager
async def local(
    name: str, model: str, dtype: str, threads: int, *, cache: bool
) -> AsyncGenerator[Side, None]:
    """Our engine in this process."""
    runtime = sgl.Runtime(model, dtype=dtype, num_threads=threads, disable_radix_cache=not cache)
    runtime.chat_template = sgl.get_chat_template("chatml")
    async with runtime:
        yield Side(name, runtime, (runtime, True), {"temperature": 0.0, "ignore_eos": True})


@asynccontextmanager
async def vllm(
    python: Path, model: str, dtype: str, threads: int, log: Path
) -> AsyncGenerator[Side, None]:
    """The same programs over vLLM's server, by its OpenAI completions.

    Raises:
        RuntimeError: it does not start.
    """
    with _served(python, model, dtype, threads, log) as (url, pid):
        plain = _backend(url, {"ignore_eos": True})
        strict = _backend(url, {"structured_outputs": {"json": SCHEMA}})
        async with plain, strict:
            yield Side("vllm server", plain, (strict, False), {"temperature": 0.0}, url, [pid])


def _backend(url: str, extra: dict[str, Any]) -> sgl.OpenAI:
    return sgl.OpenAI(
        _SERVED_AS,
        is_chat_model=False,
        chat_template=sgl.get_chat_template("chatml"),
        api_key="none",
        base_url=f"{url}/v1",
        request_args={"extra_body": extra},
        timeout=600.0,
    )


@contextmanager
def _served(
    python: Path, model: str, dtype: str, threads: int, log: Path
) -> Iterator[tuple[str, int]]:
    """A running server's address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", _SERVED_AS, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", dtype, "--max-model-len", "8192", "--max-num-seqs", "64"]
    command += ["--enable-prefix-caching", "--disable-uvicorn-access-log"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | settings, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log)
            yield url, process.pid
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_LIMIT_S
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"vLLM's server ended with {process.returncode}; see {log}")
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
    raise RuntimeError(f"vLLM's server was not ready within {_START_LIMIT_S:.0f} s; see {log}")
