"""What is particular to LiteLLM: a late, quiet import, its table, text completion, its own limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.backends.litellm import LiteLLM
from asyncsgl.errors import InvalidArgument, UnsupportedFeature, UsageError
from tests.fakes.openai import KEY, FakeOpenAI
from tests.fakes.service import PNG, Fault

pytest.importorskip("litellm")
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def no_blocking_calls() -> None:
    """Not looked for here: LiteLLM reads files on the event loop itself."""


@pytest.fixture
async def fake() -> AsyncGenerator[FakeOpenAI, None]:
    async with FakeOpenAI() as service:
        yield service


def at(fake: FakeOpenAI, model: str = "openai/gpt-4o", **params: Any) -> LiteLLM:
    return LiteLLM(model, api_key=KEY, api_base=f"{fake.url}/v1", **params)


@sgl.function
async def ask(s: sgl.ProgramState, **gen: Any) -> None:
    s += sgl.user("Who?")
    s += sgl.assistant(sgl.gen("answer", **gen))


IMPORT = """
import asyncio, sys
import asyncsgl as sgl
from asyncsgl.backends.litellm import LiteLLM
from tests.fakes.openai import KEY, FakeOpenAI

def offline(event, arguments):
    if event == "socket.connect" and arguments[1][0] != "127.0.0.1":
        raise AssertionError(f"connects to {arguments[1]}")
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", None):
        raise AssertionError(f"looks up {arguments[0]}")

@sgl.function
async def ask(s):
    s += sgl.user("Who?")
    s += sgl.assistant(sgl.gen("answer"))

async def main():
    async with FakeOpenAI() as fake:
        async with LiteLLM("openai/gpt-4o", api_key=KEY, api_base=f"{fake.url}/v1") as backend:
            assert "litellm" not in sys.modules, "it was imported early"
            state = await ask.run(backend=backend)
            assert state["answer"] == "Hello world"
            import litellm.constants
            assert litellm.constants.AIOHTTP_CONNECTOR_LIMIT_PER_HOST >= 4096
            fake.context = 0
            try:
                await ask.run(backend=backend)
            except sgl.ContextLengthError:
                pass

sys.addaudithook(offline)
asyncio.run(main())
"""


def test_it_is_imported_late_off_the_network_and_says_nothing() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_both_names_of_the_model(fake: FakeOpenAI) -> None:
    async with LiteLLM(model="openai/gpt-4o", api_key=KEY, api_base=f"{fake.url}/v1") as backend:
        assert backend.model_name == "openai/gpt-4o"
        assert (await ask.run(backend=backend))["answer"] == "Hello world"
    with pytest.raises(InvalidArgument, match="twice"):
        LiteLLM("openai/gpt-4o", model="openai/gpt-4")
    with pytest.raises(InvalidArgument, match="model_name"):
        LiteLLM()


async def test_its_table_tells_what_a_model_takes(fake: FakeOpenAI) -> None:
    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        s += sgl.user("What?" + sgl.image(PNG))
        s += sgl.assistant(sgl.gen("answer"))

    async with at(fake, "openai/gpt-3.5-turbo") as backend:
        await ask.run(seed=1, backend=backend)
        with pytest.raises(UnsupportedFeature, match="text only"):
            await look.run(backend=backend)
    async with at(fake, "openai/gpt-4o") as backend:
        assert (await look.run(backend=backend))["answer"] == "Hello world"
    seen = len(fake.seen)
    async with at(fake, "anthropic/claude-3-haiku-20240307") as backend:
        with pytest.raises(UnsupportedFeature, match="seed"):
            await ask.run(seed=1, backend=backend)
    assert len(fake.seen) == seen, "nothing was sent"


async def test_structured_output_where_its_table_has_it(fake: FakeOpenAI) -> None:
    fake.answers = '{"a": 1}'
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with at(fake) as backend, at(fake, "openai/gpt-3.5-turbo") as older:
        for one in (backend, older):
            state = await ask.run(json_schema=schema, backend=one)
            assert state.value("answer") == {"a": 1}
    assert ["response_format" in body for body in fake.bodies] == [True, False]


async def test_text_completion(fake: FakeOpenAI) -> None:
    fake.answers = " 42 is it"
    async with at(fake, "text-completion-openai/my-model", is_chat_model=False) as backend:
        state = await ask.run(stop=" is", backend=backend)
        assert state["answer"] == " 42"
        async with ask.stream(backend=backend) as running:
            assert "".join([piece async for piece in running.text("answer")]) == " 42 is it"
    assert {seen.path for seen in fake.seen} == {"/v1/completions"}


async def test_its_own_retries_are_off(fake: FakeOpenAI) -> None:
    fake.faults.extend([Fault("status", 429, {"retry-after": "0"})] * 3)
    async with at(fake, max_retries=2) as backend:
        with pytest.raises(sgl.RateLimitError):
            await ask.run(backend=backend)
    assert len(fake.seen) == 3


async def test_the_compromised_release_is_not_loaded(
    fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncsgl.backends.litellm.version", lambda _: "1.107.0")
    async with at(fake) as backend:
        with pytest.raises(UsageError, match="compromised"):
            await ask.run(backend=backend)
    assert fake.seen == []


async def test_another_address_has_no_known_price(fake: FakeOpenAI) -> None:
    async with at(fake) as backend:
        await ask.run(backend=backend)
        assert backend.cost is None
