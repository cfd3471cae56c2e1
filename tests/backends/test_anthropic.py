"""What is particular to Anthropic: versions, prefill and folding, caching, blocks, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.backends.anthropic import Anthropic
from asyncsgl.backends.anthropic_models import traits_of
from asyncsgl.errors import (
    BackendError,
    ContentFilterError,
    ContextLengthError,
    InvalidArgument,
    UnsupportedFeature,
)
from tests.fakes.anthropic import KEY, FakeAnthropic
from tests.fakes.service import PNG, Fault

pytestmark = pytest.mark.anyio
NOTHING: Mapping[str, Any] = {}


@pytest.fixture
async def fake() -> AsyncGenerator[FakeAnthropic, None]:
    async with FakeAnthropic() as service:
        yield service


def at(fake: FakeAnthropic, model: str = "claude-haiku-4-5", **settings: Any) -> Anthropic:
    return Anthropic(model, base_url=fake.url, api_key=KEY, **settings)


@sgl.function
async def ask(s: sgl.ProgramState, gen: Mapping[str, Any] = NOTHING) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("Who?")
    s += sgl.assistant(sgl.gen("answer", **gen))


@sgl.function
async def go_on(s: sgl.ProgramState) -> None:
    s += sgl.user("Count.")
    s += sgl.assistant("One, two, " + sgl.gen("rest"))


@sgl.function
async def about_a_story(s: sgl.ProgramState, number: int) -> None:
    s += sgl.system("Long ago. " * 600)
    s += sgl.user(f"Question {number}?")
    s += sgl.assistant(sgl.gen("answer"))


@pytest.mark.parametrize(
    ("model", "sampling", "prefill", "structured"),
    [
        ("claude-3-opus-20240229", True, True, False),
        ("claude-3-5-sonnet-20241022", True, True, False),
        ("claude-opus-4-20250514", True, True, False),
        ("claude-haiku-4-5-20251001", True, True, True),
        ("claude-sonnet-4-6", True, False, True),
        ("claude-opus-4-7", False, False, True),
        ("claude-sonnet-5", False, False, True),
        ("claude-haiku-5-1", False, False, True),
        ("claude-mythos", False, False, True),
    ],
)
def test_traits_by_name(model: str, sampling: bool, prefill: bool, structured: bool) -> None:
    traits = traits_of(model)
    assert (traits.sampling, traits.prefill, traits.structured) == (sampling, prefill, structured)


async def test_the_system_message_is_lifted_and_the_program_keeps_its_own(
    fake: FakeAnthropic,
) -> None:
    async with at(fake) as backend:
        state = await ask.run(backend=backend)
    body = fake.bodies[0]
    assert [block["text"] for block in body["system"]] == ["You are brief."]
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert [message["role"] for message in state.messages()] == ["system", "user", "assistant"]


async def test_sampling_goes_with_the_old_version_of_the_api(fake: FakeAnthropic) -> None:
    async with at(fake) as backend:
        await ask.run(gen={"temperature": 0.5, "top_k": 3}, backend=backend)
        await ask.run(backend=backend)
    assert fake.bodies[0]["temperature"] == 0.5
    versions = [seen.headers["anthropic-version"] for seen in fake.seen]
    assert versions == ["2023-06-01", "2026-10-21"]


async def test_newer_models_take_no_sampling(fake: FakeAnthropic) -> None:
    async with at(fake, "claude-sonnet-5") as backend:
        with pytest.raises(UnsupportedFeature, match="temperature"):
            await ask.run(gen={"temperature": 0.5}, backend=backend)
        await ask.run(gen={"temperature": 1.0}, backend=backend)
    assert len(fake.seen) == 1


async def test_prefill_has_no_space_at_its_end_and_the_text_has_one(fake: FakeAnthropic) -> None:
    fake.answers = " three"
    async with at(fake) as backend:
        state = await go_on.run(backend=backend)
        assert fake.bodies[0]["messages"][-1]["content"][0]["text"] == "One, two,"
        assert state.messages()[-1]["content"] == "One, two, three"
        async with go_on.stream(backend=backend) as running:
            assert "".join([piece async for piece in running.text("rest")]) == "three"


async def test_without_prefill_the_turn_is_folded(fake: FakeAnthropic) -> None:
    fake.answers = "three"
    async with at(fake, "claude-sonnet-5") as backend:
        state = await go_on.run(backend=backend)
    meta = state.meta("rest")
    assert isinstance(meta, sgl.Meta)
    assert meta.emulated == ("continue_assistant: folded into the user's turn",)
    last = fake.bodies[0]["messages"][-1]
    assert last["role"] == "user"
    assert last["content"][0]["text"].startswith("Count.")
    assert "One, two, " in last["content"][0]["text"]


async def test_a_model_that_refuses_prefill_is_remembered(fake: FakeAnthropic) -> None:
    fake.prefill = False
    async with at(fake, "claude-haiku-4-5", prefill=True) as backend:
        await go_on.run(backend=backend)
        await go_on.run(backend=backend)
        assert backend.capabilities.support("continue_assistant") == "emulated"
    assert len(fake.seen) == 3


async def test_a_model_that_refuses_sampling_is_remembered(fake: FakeAnthropic) -> None:
    async with at(fake, "claude-sonnet-5", sampling=True) as backend:
        for _ in range(2):
            with pytest.raises(UnsupportedFeature, match="temperature"):
                await ask.run(gen={"temperature": 0.5}, backend=backend)
        await ask.run(backend=backend)
    assert len(fake.seen) == 2


async def test_a_model_that_refuses_schemas_is_remembered(fake: FakeAnthropic) -> None:
    fake.structured = False
    fake.answers = '{"a": 1}'
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with at(fake) as backend:
        for _ in range(2):
            state = await ask.run(gen={"json_schema": schema}, backend=backend)
            assert state.value("answer") == {"a": 1}
    assert ["output_config" in body for body in fake.bodies] == [True, False, False]


@pytest.mark.parametrize("streamed", [False, True])
async def test_thinking_is_kept_apart(fake: FakeAnthropic, streamed: bool) -> None:
    @sgl.function
    async def think(s: sgl.ProgramState) -> None:
        s += sgl.user("Think.")
        s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer"), "think"))

    fake.reasoning = "Because."
    async with at(fake, request_args={"thinking": {"type": "adaptive"}}) as backend:
        if streamed:
            async with think.stream(backend=backend) as running:
                state = await running.result()
        else:
            state = await think.run(backend=backend)
    assert (state["answer"], state["answer_reasoning_content"]) == ("Hello world", "Because.")
    assert fake.bodies[0]["thinking"] == {"type": "adaptive"}


async def test_while_it_thinks_there_is_no_sampling_and_no_prefill(fake: FakeAnthropic) -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
    fake.answers = "three"
    async with at(fake, request_args=thinking) as backend:
        await ask.run(gen={"max_tokens": 50}, backend=backend)
        await ask.run(backend=backend)
        state = await go_on.run(backend=backend)
        with pytest.raises(UnsupportedFeature, match="while it thinks"):
            await ask.run(gen={"temperature": 0.5}, backend=backend)
    assert [body["max_tokens"] for body in fake.bodies[:2]] == [2050, 2128]
    assert fake.bodies[2]["messages"][-1]["role"] == "user"
    meta = state.meta("rest")
    assert isinstance(meta, sgl.Meta)
    assert meta.emulated == ("continue_assistant: folded into the user's turn",)
    async with at(fake, request_args={"thinking": {"type": "adaptive"}}) as backend:
        await ask.run(backend=backend)
    assert fake.bodies[-1]["max_tokens"] == 4096


async def test_long_answers_have_no_trap(fake: FakeAnthropic) -> None:
    async with at(fake) as backend:
        state = await ask.run(gen={"max_tokens": 20_000}, backend=backend)
    assert state["answer"] == "Hello world"


async def test_the_branches_of_a_fork_share_what_the_first_has_cached(
    fake: FakeAnthropic,
) -> None:
    @sgl.function
    async def forks(s: sgl.ProgramState) -> None:
        s += sgl.system("Long ago. " * 600)
        s += sgl.user("A story, please.")
        s += sgl.assistant("It was a dark night.")
        async with s.fork(4) as branches:
            for number, branch in enumerate(branches):
                branch += sgl.user(f"Question {number}?")
                branch += sgl.assistant(sgl.gen("answer"))

    async with at(fake) as backend:
        state = await forks.run(backend=backend)
    metas = state.meta("answer")
    assert isinstance(metas, list)
    assert sum(meta.cached_tokens == 0 for meta in metas if isinstance(meta, sgl.Meta)) == 1
    assert state.usage.cached_tokens > 3 * 1000
    assert state.usage.cache_write_tokens * 3 == state.usage.cached_tokens
    assert state.usage.prompt_tokens > 4 * state.usage.cache_write_tokens
    marked = fake.bodies[0]["messages"][1]["content"][-1]
    assert marked["cache_control"] == {"type": "ephemeral"}
    async with at(fake, cache=False) as backend:
        await forks.run(backend=backend)
    assert "cache_control" not in str(fake.bodies[-1])


async def test_the_others_wait_for_the_first_token_and_not_for_the_whole(
    fake: FakeAnthropic,
) -> None:
    fake.answers = "one two three four five six"
    fake.faults.append(Fault("stall"))
    async with at(fake) as backend:
        first = asyncio.create_task(about_a_story.run(number=0, backend=backend))
        await fake.came.wait()
        others = [about_a_story.run(number=number, backend=backend) for number in (1, 2)]
        states = await asyncio.gather(*others)
        assert not first.done()
        first.cancel()
        await asyncio.wait([first])
    assert [state["answer"] for state in states] == [fake.answers] * 2
    assert [body.get("stream", False) for body in fake.bodies] == [True, False, False]
    assert all(state.usage.cached_tokens > 1000 for state in states)


async def test_images_count_in_what_branches_share(fake: FakeAnthropic) -> None:
    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        s += sgl.user("A picture: " + sgl.image(PNG))
        s += sgl.assistant("I see it.")
        async with s.fork(2) as branches:
            for number, branch in enumerate(branches):
                branch += sgl.user(f"Question {number}?")
                branch += sgl.assistant(sgl.gen("answer"))

    async with at(fake) as backend:
        state = await look.run(backend=backend)
    assert state.usage.cached_tokens > 0


async def test_when_the_first_of_a_fork_fails_another_goes_ahead(fake: FakeAnthropic) -> None:
    fake.faults.append(Fault("status", 400))
    async with at(fake) as backend:
        results = await asyncio.gather(
            *[about_a_story.run(number=number, backend=backend) for number in range(4)],
            return_exceptions=True,
        )
    assert sum(isinstance(result, sgl.State) for result in results) == 3


@sgl.function
async def look(s: sgl.ProgramState) -> None:
    s += sgl.user("What? " + sgl.image("https://example.org/a.png?x=1"))
    s += sgl.assistant(sgl.gen("answer"))


async def test_the_address_of_an_image_is_sent_as_it_is(fake: FakeAnthropic) -> None:
    async with at(fake) as backend:
        await look.run(backend=backend)
    source = fake.bodies[0]["messages"][0]["content"][1]["source"]
    assert source == {"type": "url", "url": "https://example.org/a.png?x=1"}


async def test_errors_that_only_anthropic_has(fake: FakeAnthropic) -> None:
    async with at(fake) as backend:
        fake.context = 1
        with pytest.raises(ContextLengthError):
            await ask.run(backend=backend)
        fake.context = 1000
        fake.faults.append(Fault("status", 429, code="contract_spend_limit_reached"))
        with pytest.raises(BackendError) as caught:
            await ask.run(backend=backend)
        assert type(caught.value) is BackendError
        fake.filtered = True
        with pytest.raises(ContentFilterError, match="refused"):
            await ask.run(backend=backend)
        assert len(fake.seen) == 3, "none of them is tried again"


async def test_a_prompt_without_turns_is_refused_before_sending(fake: FakeAnthropic) -> None:
    @sgl.function
    async def nothing(s: sgl.ProgramState) -> None:
        s += sgl.system("You are brief.")
        s += sgl.assistant(sgl.gen("answer"))

    async with at(fake) as backend:
        with pytest.raises(UnsupportedFeature, match=r"sgl\.user"):
            await nothing.run(backend=backend)
    assert fake.seen == []


async def test_white_space_alone_is_a_stop_that_is_cut_here(fake: FakeAnthropic) -> None:
    fake.answers = "one\ntwo END three"
    async with at(fake) as backend:
        state = await ask.run(gen={"stop": ["\n", "END"]}, backend=backend)
    assert state["answer"] == "one"
    assert fake.bodies[0]["stop_sequences"] == ["END"]


def test_a_key_is_needed() -> None:
    with pytest.raises(InvalidArgument, match="ANTHROPIC_API_KEY"):
        Anthropic("claude-3-haiku-20240307")
