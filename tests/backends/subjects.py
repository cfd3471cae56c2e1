"""The backends that the contract suite runs over, each with the service behind it.

To bring in another backend, add a :class:`Subject` to :data:`SUBJECTS`: its ``open`` gives a
:class:`Harness` as a context manager. The service answers by script (``answers``) and fails on
demand (``faults``); what the backend declares as refused is tested for being refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from asyncsgl.backends.anthropic import Anthropic
from asyncsgl.backends.base import Backend
from asyncsgl.backends.openai import OpenAI
from asyncsgl.backends.provider import ProviderBackend
from asyncsgl.backends.retry import RetryPolicy
from asyncsgl.backends.router import Router
from asyncsgl.backends.vertex import VertexAI
from tests.fakes.anthropic import KEY as ANTHROPIC_KEY
from tests.fakes.anthropic import FakeAnthropic
from tests.fakes.gemini import KEY as GEMINI_KEY
from tests.fakes.gemini import TOKEN, FakeGemini
from tests.fakes.openai import KEY, FakeOpenAI
from tests.fakes.service import FakeService

QUICK = RetryPolicy(first_delay=0.001, max_delay=0.01)


@dataclass
class Harness:
    """One backend and the service behind it.

    Args:
        backend: what is tested.
        provider: what of it makes the calls; the backend itself, or the one behind a router.
        service: answers it.
        key: the secret that must not show anywhere.
        make: makes another backend like this one, with other settings.
    """

    backend: Backend
    provider: ProviderBackend
    service: FakeService
    key: str
    make: Callable[..., Backend]


Open = Callable[..., AbstractAsyncContextManager[Harness]]


@dataclass(frozen=True)
class Subject:
    """One backend to test.

    Args:
        name: of the test's case.
        open: gives the harness; takes settings of the backend.
        needs: the module without which it cannot be tested here.
    """

    name: str
    open: Open
    needs: str

    @property
    def missing(self) -> str:
        """The missing module, or nothing."""
        try:
            return "" if find_spec(self.needs) is not None else self.needs
        except ModuleNotFoundError:
            return self.needs


def harness(
    service_of: Callable[[], FakeService],
    backend_of: Callable[..., Backend],
    key: str,
) -> Open:
    """An ``open`` of a service and a backend made for its address."""

    @asynccontextmanager
    async def opened(**settings: Any) -> AsyncGenerator[Harness, None]:
        async with service_of() as service:

            def make(**more: Any) -> Backend:
                backend = backend_of(service.url, **more)
                provider_in(backend).policy = QUICK
                return backend

            async with make(**settings) as backend:
                yield Harness(backend, provider_in(backend), service, key, make)

    return opened


def provider_in(backend: Backend) -> ProviderBackend:
    """The provider's backend that makes the calls."""
    found = backend.backends[0] if isinstance(backend, Router) else backend
    assert isinstance(found, ProviderBackend)
    return found


def _openai(model: str, path: str = "/v1", **fixed: Any) -> Callable[..., OpenAI]:
    def make(url: str, **settings: Any) -> OpenAI:
        return OpenAI(model, base_url=f"{url}{path}", api_key=KEY, **fixed, **settings)

    return make


def _azure(url: str, **settings: Any) -> OpenAI:
    return OpenAI(
        "my-deployment",
        is_azure=True,
        azure_endpoint=url,
        api_version="2024-10-21",
        api_key=KEY,
        **settings,
    )


def _azure_v1(url: str, **settings: Any) -> OpenAI:
    return OpenAI("my-deployment", is_azure=True, azure_endpoint=url, api_key=KEY, **settings)


def _anthropic(model: str) -> Callable[..., Anthropic]:
    def make(url: str, **settings: Any) -> Anthropic:
        return Anthropic(model, base_url=url, api_key=ANTHROPIC_KEY, **settings)

    return make


def _claude(version: str) -> Subject:
    opened = harness(FakeAnthropic, _anthropic(f"claude-{version}"), ANTHROPIC_KEY)
    return Subject(f"anthropic-{version}", opened, "anthropic")


def _gemini(url: str, **settings: Any) -> VertexAI:
    return VertexAI("gemini-3.5-flash", api_key=GEMINI_KEY, base_url=url, **settings)


def _vertex(url: str, **settings: Any) -> VertexAI:
    from google.oauth2.credentials import Credentials

    return VertexAI(
        "gemini-pro",
        project_id="project",
        location="us-central1",
        credentials=Credentials(token=TOKEN),  # type: ignore[no-untyped-call]
        base_url=url,
        **settings,
    )


def _litellm(url: str, **settings: Any) -> ProviderBackend:
    from asyncsgl.backends.litellm import LiteLLM

    return LiteLLM("openai/gpt-4o", api_key=KEY, api_base=f"{url}/v1", **settings)


def _router(url: str, **settings: Any) -> Router:
    return Router([_openai("gpt-4o")(url, **settings)])


SUBJECTS: list[Subject] = [
    Subject("openai-chat", harness(FakeOpenAI, _openai("gpt-4o"), KEY), "openai"),
    Subject("openai-reasoning", harness(FakeOpenAI, _openai("gpt-5.5"), KEY), "openai"),
    Subject("openai-deciding", harness(FakeOpenAI, _openai("gpt-6-luna"), KEY), "openai"),
    Subject("openai-completion", harness(FakeOpenAI, _openai("davinci-002"), KEY), "openai"),
    Subject("azure", harness(FakeOpenAI, _azure, KEY), "openai"),
    Subject("azure-v1", harness(FakeOpenAI, _azure_v1, KEY), "openai"),
    _claude("haiku-4-5"),
    _claude("opus-4-6"),
    _claude("sonnet-5"),
    _claude("3-haiku-20240307"),
    Subject("litellm", harness(FakeOpenAI, _litellm, KEY), "litellm"),
    Subject("router", harness(FakeOpenAI, _router, KEY), "openai"),
    Subject("gemini", harness(FakeGemini, _gemini, GEMINI_KEY), "google.genai"),
    Subject("vertex", harness(FakeGemini, _vertex, TOKEN), "google.genai"),
]
