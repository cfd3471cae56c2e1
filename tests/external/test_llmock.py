"""The backends against llmock, which breaks in many ways and judges how its clients bore it.

It has no completion models, and honours neither stop strings nor limits; ``nox -s llmock``.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.backends.provider import ProviderBackend
from asyncsgl.backends.retry import Clock, RetryPolicy

from .services import command, free_port, served

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
BACKENDS: dict[str, Callable[..., ProviderBackend]] = {
    "openai": lambda url, **more: sgl.OpenAI("gpt-4o", base_url=f"{url}/v1", **more),
    "anthropic": lambda url, **more: sgl.Anthropic(
        "claude-sonnet-5", base_url=f"{url}/anthropic", **more
    ),
    "gemini": lambda url, **more: sgl.VertexAI(
        "gemini-3.5-flash", base_url=f"{url}/gemini", api_version="v1beta", **more
    ),
}


class Judge:
    """The running service, by its own addresses for tests."""

    def __init__(self, url: str) -> None:
        self.url = url

    def will(self, *behaviours: dict[str, Any]) -> None:
        """What it does with the next requests."""
        self._call("/_llmock/scenario", {"behaviors": list(behaviours)})

    def reset(self) -> None:
        self._call("/_llmock/reset", {})

    def requests(self) -> list[dict[str, Any]]:
        found = self._call("/_llmock/requests")
        requests: list[dict[str, Any]] = found["requests"] if isinstance(found, dict) else found
        return requests

    def verdict(self) -> list[str]:
        """What it found wrong with its client, errors and warnings."""
        found = self._call("/_llmock/verdict")
        return [finding["code"] for finding in found["findings"]]

    def _call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or b"null")


@pytest.fixture(scope="session")
def llmock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    program = command("ASYNCSGL_LLMOCK", "the program llmock")
    port = free_port()
    arguments = [program, "serve", "--port", str(port), "--log-level", "warning"]
    log = tmp_path_factory.mktemp("llmock") / "log"
    with served(arguments, f"http://127.0.0.1:{port}", log) as url:
        yield Judge(url)


@pytest.fixture(params=BACKENDS)
def provider(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def judge(llmock: Judge) -> Judge:
    llmock.reset()
    return llmock


def backend(judge: Judge, provider: str, **settings: Any) -> ProviderBackend:
    return BACKENDS[provider](judge.url, api_key="anything", **settings)


@sgl.function
async def ask(s: sgl.ProgramState, **gen: Any) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("Say hello.")
    s += sgl.assistant(sgl.gen("answer", **gen))


async def read(at: ProviderBackend) -> tuple[str, sgl.State]:
    async with ask.stream(backend=at) as running:
        pieces = [piece async for piece in running.text("answer")]
        return "".join(pieces), await running.result()


async def test_answers_whole_and_streamed(judge: Judge, provider: str) -> None:
    judge.will({"type": "reply", "text": "Hello there, world.", "times": 2})
    async with backend(judge, provider) as at:
        whole = await ask.run(backend=at)
        text, streamed = await read(at)
    assert whole["answer"] == text == streamed["answer"] == "Hello there, world."
    assert whole.usage.prompt_tokens == streamed.usage.prompt_tokens > 0
    assert whole.usage.completion_tokens == streamed.usage.completion_tokens > 0
    assert judge.verdict() == []


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429, "retry_after": 1},
        {"status": 503, "retry_after": 1},
        {"status": 500},
        {"status": 529},
    ],
    ids=lambda fault: str(fault["status"]),
)
async def test_what_passes_is_waited_for(
    judge: Judge,
    provider: str,
    fault: dict[str, Any],
    streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # it takes a second wait that is by chance the shorter one for no back-off at all
    monkeypatch.setattr(ProviderBackend, "clock", Clock(random=lambda: 0.5))
    judge.will({"type": "fail", "times": 2, **fault}, {"type": "reply", "text": "Hello."})
    async with backend(judge, provider) as at:
        text = (await read(at))[0] if streamed else (await ask.run(backend=at))["answer"]
    assert text == "Hello."
    assert len(judge.requests()) == 3
    assert judge.verdict() == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, sgl.BadRequestError),
        (401, sgl.AuthenticationError),
        (403, sgl.AuthenticationError),
        (404, sgl.NotFoundError),
    ],
)
async def test_what_cannot_pass_is_not_tried_again(
    judge: Judge, provider: str, status: int, kind: type[sgl.BackendError]
) -> None:
    judge.will({"type": "fail", "status": status, "times": None})
    async with backend(judge, provider) as at:
        with pytest.raises(kind) as caught:
            await ask.run(backend=at)
    assert caught.value.status == status
    assert len(judge.requests()) == 1
    assert judge.verdict() == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("disconnect", sgl.BackendConnectionError),
        ("truncate", sgl.TruncatedStreamError),
        ("malformed", sgl.BackendError),
        ("stall", sgl.BackendTimeout),
    ],
)
async def test_a_stream_that_breaks_is_no_answer(
    judge: Judge, provider: str, fault: str, kind: type[sgl.BackendError]
) -> None:
    judge.will(
        {"type": "reply", "text": "one two three four five six seven eight"},
        {"type": "stream_fault", "kind": fault, "after_chunks": 3},
    )
    async with backend(judge, provider, timeout=1.0) as at:
        with pytest.raises(kind):
            await read(at)
    assert len(judge.requests()) == 1
    # it sees that a stream which had begun was not tried again, and not that this was an error
    unseen = {"gave_up", "truncated_stream_accepted", "malformed_chunk_ignored"}
    assert set(judge.verdict()) <= unseen


async def test_a_slow_service_is_waited_for(judge: Judge, provider: str) -> None:
    judge.will(
        {"type": "reply", "text": "Hello.", "times": 2},
        {"type": "delay", "seconds": 0.3},
        {"type": "slow_first_token", "seconds": 0.3},
    )
    async with backend(judge, provider) as at:
        assert (await ask.run(backend=at))["answer"] == "Hello."
        assert (await read(at))[0] == "Hello."


@pytest.mark.parametrize("provider", ["openai", "gemini"], indirect=True)
async def test_schemas_are_kept(judge: Judge, provider: str) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
        "required": ["name", "size"],
    }
    async with backend(judge, provider) as at:
        value = (await ask.run(json_schema=schema, backend=at)).value("answer")
        number = (await ask.run(dtype=int, backend=at)).value("answer")
    assert isinstance(value, dict)
    assert set(value) == {"name", "size"}
    assert isinstance(number, int)


async def test_several_answers(judge: Judge, provider: str) -> None:
    judge.will({"type": "reply", "text": "Hello.", "times": 3})
    async with backend(judge, provider) as at:
        state = await ask.run(n=3, backend=at)
    assert state["answer"] == ["Hello."] * 3
    assert len(judge.requests()) == (1 if provider == "openai" else 3)


async def test_a_real_quota_is_kept(llmock: Judge, provider: str, tmp_path: Path) -> None:
    program = command("ASYNCSGL_LLMOCK", "the program llmock")
    port = free_port()
    arguments = [program, "serve", "--port", str(port), "--rpm", "1200", "--log-level", "warning"]
    with served(arguments, f"http://127.0.0.1:{port}", tmp_path / "log") as url:
        judge = Judge(url)
        async with backend(judge, provider, rpm=1200) as at:
            at.policy = RetryPolicy(max_retries=0)
            await asyncio.gather(*[ask.run(backend=at) for _ in range(80)])
        assert [request["status"] for request in judge.requests()] == [200] * 80
        assert judge.verdict() == []
