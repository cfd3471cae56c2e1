"""Keys show nowhere: not in errors, not in reprs, not in logs, not in what names a backend."""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncGenerator
from dataclasses import is_dataclass

import pytest

import asyncsgl as sgl
from asyncsgl.backends.retry import RetryPolicy
from asyncsgl.backends.sdk_errors import no_secrets
from tests.fakes.openai import FakeOpenAI
from tests.fakes.service import Fault

from .subjects import SUBJECTS, Harness, Subject

pytestmark = pytest.mark.anyio
WITHOUT_LITELLM = [subject for subject in SUBJECTS if subject.name != "litellm"]


@pytest.fixture(params=WITHOUT_LITELLM, ids=lambda subject: subject.name)
async def at(request: pytest.FixtureRequest) -> AsyncGenerator[Harness, None]:
    subject: Subject = request.param
    if subject.missing:
        pytest.skip(f"{subject.missing} is not installed")
    async with subject.open() as opened:
        yield opened


@sgl.function
async def ask(s: sgl.ProgramState) -> None:
    s += sgl.user("Who?")
    s += sgl.assistant(sgl.gen("answer"))


async def test_a_key_that_the_service_repeats_is_not_shown(at: Harness) -> None:
    at.provider.policy = RetryPolicy(max_retries=0)
    words = f"the key {at.key} is wrong"
    for status in (400, 401, 429, 500):
        at.service.faults.append(Fault("status", status, message=words))
        with pytest.raises(sgl.BackendError, match="is wrong") as caught:
            await ask.run(backend=at.backend)
        said = [str(caught.value), repr(caught.value), caught.value.message]
        assert not [text for text in said if at.key in text]


async def test_a_key_of_no_known_form_is_not_shown_either() -> None:
    key = "tulips, daffodils"
    async with FakeOpenAI() as fake:
        fake.faults.append(Fault("status", 401, message=f"wrong: {key}!"))
        async with sgl.OpenAI("gpt-4o", base_url=f"{fake.url}/v1", api_key=key) as backend:
            with pytest.raises(sgl.AuthenticationError, match=r"wrong: \*\*\*!") as caught:
                await ask.run(backend=backend)
    assert key not in str(caught.value) + caught.value.message


async def test_logs_and_tracebacks_have_no_key(
    at: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    at.provider.policy = RetryPolicy(max_retries=0)
    with caplog.at_level(logging.DEBUG):
        await ask.run(backend=at.backend)
        for fault in (Fault("status", 401), Fault("disconnect"), Fault("bad_json")):
            at.service.faults.append(fault)
            with pytest.raises(sgl.BackendError) as caught:
                await ask.run(backend=at.backend)
            assert at.key not in "".join(traceback.format_exception(caught.value))
    assert at.key not in caplog.text


async def test_what_names_a_backend_has_no_key(at: Harness) -> None:
    backend = at.provider
    shown = [repr(at.backend), at.backend.identity]
    shown += [repr(backend), str(backend), backend.identity, repr(backend.settings)]
    shown += [repr(backend.limiter), str(backend.statistics()), repr(backend.capabilities)]
    shown += [repr(value) for value in vars(backend).values() if is_dataclass(value)]
    assert not [text for text in shown if at.key in text]


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcDEF123456_789",
        "sk-ant-api03-abcdef0123",
        "AIzaSyD-abcdef_0123456789",
        "ya29.a0AfH6SMBx",
        "gsk_abcdefgh12345678",
        "0123456789abcdef0123456789abcdef",
        "eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJ4In0.c2lnbmF0dXJl",
    ],
)
def test_what_looks_like_a_key_is_masked(secret: str) -> None:
    for words in (f"bad key: {secret}", f"{secret}.", f"key='{secret}'", f'"{secret}", again'):
        masked = no_secrets(words)
        assert secret not in masked
        assert "***" in masked
    assert no_secrets("Authorization: Bearer abc, then") == "Authorization: Bearer ***, then"
    assert no_secrets("GET /v1?key=abc&alt=sse") == "GET /v1?key=***&alt=sse"
    said = "request req_0123456789abcdef0123456789abcdef failed: task-oriented, sky-high"
    assert no_secrets(said) == said
