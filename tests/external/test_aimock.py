"""The backends against aimock, which has the addresses of Azure and Vertex, too.

It answers by rules and honours neither stop strings, limits, n nor schemas; ``nox -s aimock``.
"""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.backends.provider import ProviderBackend

from .services import command, free_port, served

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
ANSWER = "Hello there, world. How are you today?"
USAGE = {
    "openai": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    "anthropic": {"input_tokens": 11, "output_tokens": 7},
    "gemini": {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18},
}


def _azure(url: str, **more: Any) -> ProviderBackend:
    return sgl.OpenAI("gpt-4o", is_azure=True, azure_endpoint=url, api_key="any", **more)


def _vertex(url: str) -> ProviderBackend:
    from google.oauth2.credentials import Credentials

    return sgl.VertexAI(
        "gemini-3.5-flash",
        project_id="project",
        location="us-central1",
        credentials=Credentials(token="any"),  # type: ignore[no-untyped-call]
        base_url=url,
        api_version="v1",
    )


def _gemini(url: str) -> ProviderBackend:
    return sgl.VertexAI("gemini-3.5-flash", api_key="any", base_url=url, api_version="v1beta")


BACKENDS: dict[str, tuple[str, Callable[[str], ProviderBackend]]] = {
    "openai": ("openai", lambda url: sgl.OpenAI("gpt-4o", base_url=f"{url}/v1", api_key="any")),
    "azure": ("openai", lambda url: _azure(url, api_version="2024-10-21")),
    "azure-v1": ("openai", _azure),
    "anthropic": (
        "anthropic",
        lambda url: sgl.Anthropic("claude-sonnet-5", base_url=url, api_key="any"),
    ),
    "gemini": ("gemini", _gemini),
    "vertex": ("gemini", _vertex),
}


def _rules() -> list[dict[str, Any]]:
    refused = {"error": {"message": "slow down"}, "status": 429, "retryAfter": 1}
    rules: list[dict[str, Any]] = []
    for name, (wire, _) in BACKENDS.items():
        usage = USAGE[wire]
        rules += [
            {
                "match": {"userMessage": f"hello, {name}"},
                "response": {"content": ANSWER, "usage": usage},
            },
            *[
                {"match": {"userMessage": f"limited {name}", "sequenceIndex": at}}
                | {"response": it}
                for at, it in enumerate([refused, refused, {"content": "At last."}])
            ],
            {
                "match": {"userMessage": f"broken {name}"},
                "response": {"error": {"message": "not so"}, "status": 400},
            },
            {
                "match": {"userMessage": f"cut {name}"},
                "response": {"content": ANSWER},
                "truncateAfterChunks": 6,
                "chunkSize": 4,
                "latency": 20,
            },
        ]
    return rules


@pytest.fixture(scope="session")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = command("ASYNCSGL_AIMOCK", "the program aimock")
    folder = tmp_path_factory.mktemp("aimock")
    rules = folder / "rules.json"
    rules.write_text(json.dumps({"fixtures": _rules()}))
    config = folder / "aimock.json"
    config.write_text(json.dumps({"llm": {"fixtures": str(rules)}}))
    port = free_port()
    arguments = [program, "--config", str(config), "--port", str(port)]
    with served(arguments, f"http://127.0.0.1:{port}", folder / "log") as url:
        yield url


@pytest.fixture(params=BACKENDS)
def provider(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def at(aimock: str, provider: str) -> Any:
    async with BACKENDS[provider][1](aimock) as backend:
        yield backend


@sgl.function
async def ask(s: sgl.ProgramState, question: str) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer"))


async def read(at: ProviderBackend, question: str) -> tuple[list[str], sgl.State]:
    async with ask.stream(question=question, backend=at) as running:
        pieces = [piece async for piece in running.text("answer")]
        return pieces, await running.result()


def seen(url: str, words: str) -> list[dict[str, Any]]:
    """The requests with these words, as the service wrote them down."""
    with urllib.request.urlopen(f"{url}/__aimock/journal", timeout=10) as answer:
        entries: list[dict[str, Any]] = json.loads(answer.read())
    return [entry for entry in entries if words in json.dumps(entry["body"])]


async def test_answers_whole_and_streamed(at: ProviderBackend, aimock: str, provider: str) -> None:
    question = f"hello, {provider}"
    whole = await ask.run(question=question, backend=at)
    pieces, streamed = await read(at, question)
    assert whole["answer"] == "".join(pieces) == ANSWER
    assert len(pieces) > 1
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (11, 7)
    assert (streamed.usage.prompt_tokens, streamed.usage.completion_tokens) == (11, 7)
    assert [entry["response"]["status"] for entry in seen(aimock, question)] == [200, 200]
    assert "You are brief." in json.dumps(seen(aimock, question)[0]["body"])


async def test_a_limit_is_waited_for(at: ProviderBackend, aimock: str, provider: str) -> None:
    state = await ask.run(question=f"limited {provider}", backend=at)
    assert state["answer"] == "At last."
    entries = seen(aimock, f"limited {provider}")
    assert [entry["response"]["status"] for entry in entries] == [429, 429, 200]
    times = [entry["timestamp"] for entry in entries]
    assert all(later - earlier >= 1000 for earlier, later in itertools.pairwise(times))


async def test_a_bad_request_is_sent_once(at: ProviderBackend, aimock: str, provider: str) -> None:
    with pytest.raises(sgl.BadRequestError, match="not so"):
        await ask.run(question=f"broken {provider}", backend=at)
    assert len(seen(aimock, f"broken {provider}")) == 1


async def test_a_stream_that_breaks_is_no_answer(
    at: ProviderBackend, aimock: str, provider: str
) -> None:
    with pytest.raises(sgl.BackendConnectionError):
        await read(at, f"cut {provider}")
    assert len(seen(aimock, f"cut {provider}")) == 1
