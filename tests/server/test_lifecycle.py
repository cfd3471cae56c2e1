"""The server process: from its ready line to its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from .process import SMALL, ServerProcess

LONG = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
SHORT = {"text": "x", "sampling_params": {"max_new_tokens": 1}}

pytestmark = pytest.mark.timeout(120)  # a process imports torch before it serves


def ends_well(lines: Iterator[str]) -> bool:
    """Whether a stream is whole: neither broken off nor ended by an error of the server's."""
    try:
        came = list(lines)
        return came[-2] == "data: [DONE]" and '"error"' not in came[-4]
    except httpx.RemoteProtocolError:
        return False


def refused(url: str) -> httpx.Response:
    """The first answer of a server that drains."""
    while True:
        response = httpx.post(f"{url}/generate", json=SHORT, timeout=30)
        if response.status_code != 200:
            return response


def test_a_signal_drains_and_a_second_one_ends(
    start: Callable[..., ServerProcess], tiny_model: Path, tmp_path: Path
) -> None:
    folder = ("--batch-folder", str(tmp_path))
    server = start("asyncsgl", "serve", "--model", str(tiny_model), "--port", "0", *SMALL, *folder)
    assert httpx.get(f"{server.url}/ready").status_code == 200
    with httpx.stream("POST", f"{server.url}/generate", json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        response = refused(server.url)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert "shutting down" in response.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert list(lines)[-2] == "data: [DONE]"  # what ran was answered to its end
    assert server.status() == 0
    assert "Traceback" not in "".join(server.lines)


def test_a_second_signal_ends_at_once(
    start: Callable[..., ServerProcess], tiny_model: Path
) -> None:
    command = ("asyncsgl.launch_server", "--model-path", str(tiny_model), "--port", "0")
    server = start(*command, "--max-total-tokens", "8192", "--log-level", "error")
    many = {**LONG, "text": ["Once upon"] * 8, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=many) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.signal(signal.SIGINT)
        assert refused(server.url).status_code == 503
        server.signal(signal.SIGINT)
        assert not ends_well(lines)
    assert server.status() == 130


def test_the_drain_has_a_limit(start: Callable[..., ServerProcess], tiny_model: Path) -> None:
    command = ("asyncsgl", "serve", "--model", str(tiny_model), "--port", "0", *SMALL)
    server = start(*command, "--no-batches", "--drain-limit", "0.1")
    many = {**LONG, "text": ["Once upon"] * 16, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=many, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        assert not ends_well(lines)
    assert server.status() == 0


def test_requests_are_refused_while_the_model_loads(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ("asyncsgl", "serve", "--model", str(tiny_model), "--port", str(port), *SMALL)
    process = subprocess.Popen([sys.executable, "-m", *command, "--no-batches"])
    url = f"http://127.0.0.1:{port}"
    try:
        first = first_answer(process, f"{url}/v1/models")
        assert first.status_code == 503
        assert first.headers["retry-after"]
        assert "being loaded" in first.json()["error"]["message"]
        assert httpx.get(f"{url}/metrics").status_code == 200
        while httpx.get(f"{url}/ready").status_code == 503:
            assert process.poll() is None
        assert httpx.get(f"{url}/v1/models").status_code == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0


def first_answer(process: subprocess.Popen[bytes], url: str) -> httpx.Response:
    """The first answer of a server that starts."""
    while True:
        assert process.poll() is None
        try:
            return httpx.get(url, timeout=30)
        except httpx.ConnectError:
            continue


def run(*command: str) -> tuple[int, str]:
    """The status and the error output of a command that does not serve."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


def test_a_port_in_use_is_told(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, error = run("asyncsgl", "serve", "--model", str(tiny_model), "--port", port)
    assert status == 2
    assert f"cannot serve on 127.0.0.1 port {port}" in error
    assert "choose another port" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora-paths", "x"), "this server has no --lora-paths x"),
        (("--tp-size", "0"), "tp_size: must be a whole number >= 1"),
        (("--mem-fraction-static", "2"), "mem_fraction_static"),
        (("--log-level", "loud"), "log_level: 'loud' is not one of"),
        (("--api-key", ""), "api_key: is empty"),
    ],
)
def test_flags_that_cannot_hold_are_refused(flags: tuple[str, ...], words: str) -> None:
    command = ("asyncsgl.launch_server", "--model-path", "no-such-model", "--port", "0")
    status, error = run(*command, *flags)
    assert (status, words in error) == (2, True), error
