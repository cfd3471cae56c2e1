"""What is particular to Gemini: two ways in, safety, thoughts, the delay in a refusal's body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.backends.retry import RetryPolicy
from asyncsgl.backends.vertex import VertexAI
from asyncsgl.errors import (
    AuthenticationError,
    ContentFilterError,
    ContextLengthError,
    InvalidArgument,
    RateLimitError,
)
from tests.fakes.gemini import KEY, FakeGemini
from tests.fakes.service import Fault

pytest.importorskip("google.genai")
pytestmark = pytest.mark.anyio
NOTHING: Mapping[str, Any] = {}


@pytest.fixture
async def fake() -> AsyncGenerator[FakeGemini, None]:
    async with FakeGemini() as service:
        yield service


def at(fake: FakeGemini, model: str = "gemini-3.5-flash", **settings: Any) -> VertexAI:
    return VertexAI(model, **{"api_key": KEY, "base_url": fake.url, **settings})


@sgl.function
async def ask(s: sgl.ProgramState, gen: Mapping[str, Any] = NOTHING) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("Who?")
    s += sgl.assistant(sgl.gen("answer", **gen))


async def read(backend: VertexAI) -> sgl.State:
    async with ask.stream(backend=backend) as running:
        return await running.result()


async def test_the_system_message_is_an_instruction(fake: FakeGemini) -> None:
    async with at(fake) as backend:
        await ask.run(backend=backend)
    assert fake.bodies[0]["systemInstruction"]["parts"][0]["text"] == "You are brief."
    assert [content["role"] for content in fake.bodies[0]["contents"]] == ["user"]


async def test_models_that_think_get_no_limit_unless_asked_for(fake: FakeGemini) -> None:
    async with at(fake) as new, at(fake, "gemini-2.0-flash") as old:
        await ask.run(backend=new)
        await ask.run(backend=old)
    limits = [body.get("generationConfig", {}).get("maxOutputTokens") for body in fake.bodies]
    assert limits == [None, 128]


@pytest.mark.parametrize("streamed", [False, True])
async def test_safety_blocks_say_why(fake: FakeGemini, streamed: bool) -> None:
    settings = {"HARM_CATEGORY_HARASSMENT": "BLOCK_ONLY_HIGH"}
    async with at(fake, safety_settings=settings) as backend:
        fake.blocked = "PROHIBITED_CONTENT"
        with pytest.raises(ContentFilterError, match=r"PROHIBITED_CONTENT.*HARASSMENT is HIGH"):
            await (read(backend) if streamed else ask.run(backend=backend))
        fake.blocked, fake.filtered = "", True
        with pytest.raises(ContentFilterError, match="SAFETY"):
            await (read(backend) if streamed else ask.run(backend=backend))
    assert fake.bodies[0]["safetySettings"] == [
        {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_ONLY_HIGH"}
    ]


@pytest.mark.parametrize("streamed", [False, True])
async def test_thoughts_are_kept_apart(fake: FakeGemini, streamed: bool) -> None:
    @sgl.function
    async def think(s: sgl.ProgramState) -> None:
        s += sgl.user("Think.")
        s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer"), "think"))

    fake.reasoning = "Because."
    async with at(fake, thinking={"include_thoughts": True}) as backend:
        if streamed:
            async with think.stream(backend=backend) as running:
                state = await running.result()
        else:
            state = await think.run(backend=backend)
    assert (state["answer"], state["answer_reasoning_content"]) == ("Hello world", "Because.")
    assert state.usage.reasoning_tokens == 5
    assert state.usage.completion_tokens == 7


async def test_the_delay_in_a_refusals_body_is_told(fake: FakeGemini) -> None:
    fake.faults.append(Fault("status", 429, details={"delay": "17.5s"}))
    async with at(fake, max_retries=0) as backend:
        with pytest.raises(RateLimitError) as caught:
            await ask.run(backend=backend)
    assert caught.value.retry_after == 17.5


async def test_many_calls_have_their_connections_each(fake: FakeGemini) -> None:
    fake.faults.extend([Fault("crowd", calls=101)] * 120)
    async with at(fake) as backend:
        await asyncio.gather(*[ask.run(backend=backend) for _ in range(120)])
    assert len(fake.seen) == 120


@sgl.function
async def look(s: sgl.ProgramState) -> None:
    s += sgl.user("What? " + sgl.image("https://example.org/a.png?x=1"))
    s += sgl.assistant(sgl.gen("answer"))


async def test_the_address_of_an_image_is_sent_with_its_type(fake: FakeGemini) -> None:
    async with at(fake) as backend:
        await look.run(backend=backend)
    data = fake.bodies[0]["contents"][0]["parts"][1]["fileData"]
    # protobuf's JSON takes both forms of the names
    assert data == {"file_uri": "https://example.org/a.png?x=1", "mime_type": "image/png"}


async def test_errors_that_only_gemini_has(fake: FakeGemini) -> None:
    async with at(fake) as backend:
        fake.context = 0
        with pytest.raises(ContextLengthError):
            await ask.run(backend=backend)
    async with at(fake, api_key="wrong") as backend:
        with pytest.raises(AuthenticationError):
            await ask.run(backend=backend)
    assert len(fake.seen) == 2


async def test_a_connection_that_is_refused_is_not_slept_over(fake: FakeGemini) -> None:
    await fake.__aexit__(None, None, None)
    async with at(fake) as backend:
        backend.policy = RetryPolicy(max_retries=0)
        with pytest.raises(sgl.BackendConnectionError):
            await ask.run(backend=backend)


async def test_answers_of_one_seed_differ(fake: FakeGemini) -> None:
    fake.answers = lambda body: f"answer {body['generationConfig']['seed']}"
    async with at(fake) as backend:
        state = await ask.run(gen={"n": 3, "seed": 7}, backend=backend)
        assert sorted(state["answer"]) == ["answer 7", "answer 8", "answer 9"]
        async with ask.stream(gen={"n": 2, "seed": 7}, backend=backend) as running:
            again = await running.result()
        assert sorted(again["answer"]) == ["answer 7", "answer 8"]


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("CONTINUATION", "length"), ("MALFORMED_RESPONSE", "abort"), ("OTHER", "abort")],
)
async def test_ends_that_only_gemini_has(fake: FakeGemini, reason: str, finish: str) -> None:
    fake.finish = reason
    async with at(fake) as backend:
        state = await ask.run(backend=backend)
        meta = state.meta("answer")
        assert isinstance(meta, sgl.Meta)
        assert meta.finish_reason == finish


async def test_a_project_of_the_environment_yields_to_a_key(
    fake: FakeGemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    async with at(fake) as backend:
        assert backend.name == "gemini"
        await ask.run(backend=backend)


def test_a_project_or_a_key_is_needed() -> None:
    with pytest.raises(InvalidArgument, match="project_id"):
        VertexAI("gemini-pro", project_id="project", api_key=KEY)
    with pytest.raises(InvalidArgument, match="GOOGLE_CLOUD_PROJECT"):
        VertexAI("gemini-pro")
