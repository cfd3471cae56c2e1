"""The official `openai` client against the default model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.server import ServerSettings

from .conftest import Served, serving

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]  # a real model

MODEL = "smollm2-135m-instruct"
QUESTION: list[Any] = [
    {"role": "user", "content": "What is the capital of France? Answer in one word."}
]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def default_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The default model behind a socket, with a key."""
    with ExitStack() as stack:
        engine = AsyncEngine(EngineConfig(max_total_tokens=8192, num_threads=1))
        folder = tmp_path_factory.mktemp("batches")
        yield serving(stack, engine, ServerSettings(api_key="secret", batch_folder=folder))


@pytest.fixture
def client(default_served: Served) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{default_served.url}/v1", api_key="secret", max_retries=0, timeout=120
    ) as made:
        yield made


@pytest.fixture
async def async_client(default_served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{default_served.url}/v1", api_key="secret", max_retries=0, timeout=120
    ) as made:
        yield made


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=8
    )
    choice = answer.choices[0]
    assert "Paris" in str(choice.message.content)
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None


async def test_chat_async_with_samples_of_a_seed(async_client: AsyncOpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 4, "n": 2, "seed": 7}
    one, two = await asyncio.gather(
        async_client.chat.completions.create(**ask), async_client.chat.completions.create(**ask)
    )
    assert [choice.index for choice in one.choices] == [0, 1]
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]


async def test_a_streamed_chat_is_the_chat(async_client: AsyncOpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    whole = await async_client.chat.completions.create(**ask)
    stream = await async_client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token
        assert bytes(entry.bytes or ()) == entry.token.encode()
        assert len(entry.top_logprobs) == 2


def test_a_json_schema_holds(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=40,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": CITY, "strict": True},
        },
    )
    found = json.loads(str(answer.choices[0].message.content))
    assert found["city"] in ("Paris", "Rome")
    assert isinstance(found["big"], bool)


def test_a_message_is_continued(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*QUESTION, {"role": "assistant", "content": "The capital of France is"}],
        temperature=0,
        max_tokens=2,
        extra_body={"continue_final_message": True, "top_k": 1},
    )
    assert str(answer.choices[0].message.content).startswith(" Paris")


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=["The capital of France is", "One, two,"],
        temperature=0,
        max_tokens=3,
        logprobs=1,
        echo=True,
        stop="\n",
    )
    one, two = answer.choices
    assert one.text.startswith("The capital of France is Paris")
    assert two.text.startswith("One, two,")
    assert one.logprobs is not None
    values: list[Any] = list(one.logprobs.token_logprobs or ())
    assert values[0] is None
    assert "".join(one.logprobs.tokens or ()).startswith("The capital of France is Paris")
    assert (one.logprobs.text_offset or [])[:3] == [0, 3, 11]


def test_a_streamed_completion(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=3, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream).startswith(" Paris")


async def test_a_batch(async_client: AsyncOpenAI) -> None:
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    ask = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    content = "".join(json.dumps({**ask, "custom_id": f"row-{row}"}) + "\n" for row in range(3))
    file = await async_client.files.create(file=content.encode(), purpose="batch")
    batch = await async_client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status != "completed":
        batch = await async_client.batches.retrieve(batch.id)
        assert batch.status in ("validating", "in_progress", "finalizing", "completed")
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 3
    output = await async_client.files.content(str(batch.output_file_id))
    rows = [json.loads(line) for line in output.text.splitlines()]
    assert {row["custom_id"] for row in rows} == {"row-0", "row-1", "row-2"}
    texts = {row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}
    assert all("Paris" in text for text in texts)


def test_models(client: OpenAI) -> None:
    assert [card.id for card in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_errors_are_the_clients_own(client: OpenAI, default_served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context length") as caught:
        client.completions.create(model=MODEL, prompt=[[5] * 9000])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with (
        OpenAI(base_url=f"{default_served.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
