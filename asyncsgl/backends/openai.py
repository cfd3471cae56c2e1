"""OpenAI, Azure OpenAI, and servers that speak their language."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import (
    BackendError,
    ContentFilterError,
    ContextLengthError,
    InvalidArgument,
    MissingDependency,
    UnsupportedFeature,
)
from ..lang.chat_template import ChatTemplate
from ..types import ChoiceScore, GenRequest, Scores, Usage
from .calls import Call, ParameterRejected, Piece, Reply
from .http_errors import error_of_status
from .openai_models import (
    Learned,
    can_decide,
    is_completion_model,
    is_reasoning_model,
    profile_of,
)
from .openai_scores import choice_scores, decision_input, decision_scores
from .openai_wire import (
    MAX_TOP_LOGPROBS,
    chat_body,
    chat_pieces,
    chat_reply,
    completion_body,
    completion_pieces,
    completion_reply,
)
from .per_loop import PerLoop
from .planning import Profile
from .provider import ProviderBackend
from .retry import retried, retry_after
from .sdk_errors import no_secrets
from .settings import Settings
from .stainless import http_client, sdk_error

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["OpenAI"]

_UNSUPPORTED = frozenset({"unsupported_parameter", "unsupported_value"})


class OpenAI(ProviderBackend):
    """A model of OpenAI, of Azure OpenAI, or of any server with the same API.

    Args:
        model_name: the model, or the deployment's name on Azure.
        is_chat_model: it takes messages; None to tell by its name.
        chat_template: makes text of messages for completion models, and for ``state.text()``.
        is_azure: use Azure OpenAI. With ``api_version`` the address has the deployment in it;
            without, the newer form ``/openai/v1/``.
        api_key: the key, or a coroutine function that gives one; else the environment's
            ``OPENAI_API_KEY`` or ``AZURE_OPENAI_API_KEY``.
        base_url: another server's address.
        azure_endpoint: the resource's address; else ``AZURE_OPENAI_ENDPOINT``.
        api_version: of the Azure API.
        azure_ad_token_provider: gives tokens in place of a key.
        is_reasoning_model: it reasons before it answers; None to tell by its name.
        reasoning_effort: sent with each call, where given.
        request_args: more parameters of each call, as ``{"service_tier": "flex"}``.
        **client_args: :class:`Settings`, and what ``openai.AsyncOpenAI`` takes.

    Raises:
        InvalidArgument: a setting is missing or out of its range.
        MissingDependency: the extra ``openai`` is not installed.
    """

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: ChatTemplate | None = None,
        is_azure: bool = False,
        api_key: str | Callable[[], Any] | None = None,
        base_url: str | None = None,
        *,
        azure_endpoint: str | None = None,
        api_version: str | None = None,
        azure_ad_token_provider: Callable[[], Any] | None = None,
        is_reasoning_model: bool | None = None,
        reasoning_effort: str | None = None,
        request_args: Mapping[str, Any] | None = None,
        **client_args: Any,
    ) -> None:
        if find_spec("openai") is None:
            raise MissingDependency("openai", "openai")
        settings = Settings.taken_from(client_args)
        if is_azure:
            api_key = api_key or os.environ.get("AZURE_OPENAI_API_KEY")
            azure_endpoint = azure_endpoint or os.environ.get("AZURE_OPENAI_ENDPOINT")
            if not (azure_endpoint or base_url):
                raise InvalidArgument(
                    "azure_endpoint", "give it, or set AZURE_OPENAI_ENDPOINT, for is_azure=True"
                )
            if api_version is None and base_url is None:
                assert azure_endpoint is not None
                base_url = f"{azure_endpoint.rstrip('/')}/openai/v1/"
        else:
            api_key = api_key or os.environ.get("OPENAI_API_KEY")
            base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        credential = api_key or azure_ad_token_provider or client_args.get("azure_ad_token")
        if not credential and not {"admin_api_key", "workload_identity"} & set(client_args):
            variable = "AZURE_OPENAI_API_KEY" if is_azure else "OPENAI_API_KEY"
            raise InvalidArgument("api_key", f"give it, or set {variable}")
        super().__init__(
            "azure" if is_azure else "openai",
            model_name,
            place=base_url or azure_endpoint or "openai",
            key=api_key if isinstance(api_key, str) else None,
            settings=settings,
            priced_as="azure" if is_azure else "openai" if base_url is None else "",
        )
        self.chat_template = chat_template
        self._chat = not is_completion_model(model_name) if is_chat_model is None else is_chat_model
        self._reasons = (
            _is_reasoning(model_name) if is_reasoning_model is None else is_reasoning_model
        )
        self._effort = reasoning_effort
        self._request_args = dict(request_args or {})
        self._fixed_args = {**self._request_args, "effort": reasoning_effort, "chat": self._chat}
        self._hosted = base_url is None and not is_azure
        self._learned = Learned()
        self._profile: Profile | None = None
        self._client_args = {**client_args, "api_key": api_key}
        if is_azure and api_version is not None:
            self._client_args |= {
                "azure_endpoint": azure_endpoint if base_url is None else None,
                "base_url": base_url,
                "api_version": api_version,
                "azure_ad_token_provider": azure_ad_token_provider,
            }
        else:
            self._client_args["base_url"] = base_url
            self._client_args["api_key"] = api_key or azure_ad_token_provider
        self._azure_class = is_azure and api_version is not None
        self._clients = PerLoop(self._connect, _disconnect)

    @property
    def profile(self) -> Profile:
        """What the model takes."""
        if self._profile is None:
            self._profile = profile_of(
                self.model_name,
                chat=self._chat,
                reasoning=self._reasons,
                effort=self._effort,
                learned=self._learned,
            )
        return self._profile

    def learn(self, rejected: ParameterRejected) -> bool:
        """Do without the parameter from now on, where that can be done."""
        self._profile = None
        return self._learned.take(rejected)

    def check(self, request: GenRequest) -> None:
        """Refuse what this model cannot do; see :meth:`Backend.check`."""
        super().check(request)
        most = MAX_TOP_LOGPROBS if self._chat else 5
        if (request.sampling.top_logprobs_num or 0) > most:
            raise UnsupportedFeature(self.name, f"top_logprobs_num above {most}", "ask for fewer")

    async def ask(self, call: Call) -> Reply:
        """One call without streaming."""
        client = await self._clients.get()
        with self._translating():
            if not self._chat:
                body = {**completion_body(call, self.model_name), **self._request_args}
                return completion_reply(await client.completions.create(**body), self.name)
            return chat_reply(await client.chat.completions.create(**self._body(call)), self.name)

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """One call, streamed."""
        client = await self._clients.get()
        options: dict[str, Any] = {"stream": True}
        if "stream_options" not in self._learned.wire:
            options["stream_options"] = {"include_usage": True}
            if self._hosted and self._chat:
                options["stream_options"]["include_obfuscation"] = False
        with self._translating():
            if self._chat:
                chunks: Any = await client.chat.completions.create(**self._body(call), **options)
                split: Callable[[Any], Iterator[Piece]] = chat_pieces
            else:
                body = {**completion_body(call, self.model_name), **self._request_args}
                chunks = await client.completions.create(**body, **options)
                split = completion_pieces
            async with chunks:
                async for chunk in chunks:
                    for piece in split(chunk):
                        yield piece

    def _body(self, call: Call) -> dict[str, Any]:
        limit = self._learned.limit_name or (
            "max_completion_tokens" if self._reasons else "max_tokens"
        )
        system = "developer" if self._reasons and self._hosted else "system"
        body = chat_body(call, self.model_name, self.name, limit_name=limit, system=system)
        if self._effort is not None:
            body["reasoning_effort"] = self._effort
        return {**body, **self._request_args}

    # -- select ------------------------------------------------------------------------------

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score the choices where the API can, else let the model choose.

        Completion models score by the logprobs of echoed prompts; some models answer the
        Decisions API; the others choose by a schema.
        """
        self._refuse_closed()
        if not self._chat:
            return await self._echoed(request, choices, unconditional)
        if can_decide(self.model_name) and 2 <= len(choices) <= 255 and self._can_decide(request):
            return await self._decided(request, choices)
        return await self.choose(request, choices)

    def _can_decide(self, request: GenRequest) -> bool:
        return all(message.role is not None for message in request.messages)

    async def _echoed(
        self, request: GenRequest, choices: Sequence[str], unconditional: bool
    ) -> Scores:
        prompt = request.text or ""
        prompts = [prompt + choice for choice in choices]
        if unconditional:
            prompts += ["\n" + choice for choice in choices]
        call = Call(request.messages, request.sampling, 0, request.request_id, "".join(prompts))

        async def once() -> tuple[list[ChoiceScore], Usage]:
            client = await self._clients.get()
            async with self._admitted(call) as ticket:
                with self._translating():
                    found = await client.completions.create(
                        model=self.model_name,
                        prompt=prompts,
                        max_tokens=0,
                        echo=True,
                        logprobs=1,
                        **self._request_args,
                    )
                scores, usage = choice_scores(found, prompt, choices, unconditional)
                ticket.settle(usage)
                return scores, usage

        scores, usage = await retried(
            once, self.policy, cooldown=self._cooldown, on_retry=self._count_retry
        )
        return Scores(tuple(scores), usage=usage)

    async def _decided(self, request: GenRequest, choices: Sequence[str]) -> Scores:
        items, instructions = decision_input(request, self.name)
        call = Call(request.messages, request.sampling, 1, request.request_id)

        async def once() -> Scores:
            client = await self._clients.get()
            async with self._admitted(call) as ticket:
                with self._translating():
                    found = await client.decisions.create(
                        model=self.model_name,
                        input=items,
                        questions=[
                            {
                                "type": "choice",
                                "instructions": instructions,
                                "choices": [{"value": choice} for choice in choices],
                            }
                        ],
                    )
                scores = decision_scores(found, choices, self.name)
                ticket.settle(scores.usage)
                return scores

        return await retried(once, self.policy, cooldown=self._cooldown, on_retry=self._count_retry)

    # -- the client --------------------------------------------------------------------------

    async def _connect(self) -> AsyncOpenAI:
        return await asyncio.to_thread(self._make_client)

    def _make_client(self) -> AsyncOpenAI:
        openai = import_module("openai")
        arguments = {name: value for name, value in self._client_args.items() if value is not None}
        major = int(openai.__version__.partition(".")[0])
        library = "httpx2" if major >= 3 else "httpx"
        if "http_client" not in arguments:
            arguments["http_client"] = http_client(openai, self.limiter.concurrency, library)
        kind = openai.AsyncAzureOpenAI if self._azure_class else openai.AsyncOpenAI
        try:
            client: AsyncOpenAI = kind(timeout=self.settings.timeout, max_retries=0, **arguments)
        except (TypeError, openai.OpenAIError) as error:
            raise InvalidArgument("client_args", no_secrets(str(error))) from error
        return client

    async def aclose(self) -> None:
        """Close all connections; closing twice is fine."""
        await super().aclose()
        await self._clients.aclose()

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Raise the SDK's errors as ours."""
        try:
            yield
        except (BackendError, UnsupportedFeature):
            raise
        except Exception as error:
            mine = translated(error, self.name)
            if mine is None:
                raise
            raise mine from error


def _is_reasoning(model: str) -> bool:
    return is_reasoning_model(model)


async def _disconnect(client: AsyncOpenAI) -> None:
    await client.close()


def translated(error: Exception, backend: str) -> BackendError | None:
    """The error of asyncsgl for one of the SDK's; None if it is none of its.

    Args:
        error: what was raised around the SDK.
        backend: the backend's name.
    """
    return sdk_error(import_module("openai"), error, backend, _status_error)


def _status_error(error: Any, backend: str) -> BackendError:
    status: int = error.status_code
    message = no_secrets(_words(error))
    where: dict[str, Any] = {
        "backend": backend,
        "request_id": error.request_id,
        "status": status,
    }
    if error.code == "context_length_exceeded":
        return ContextLengthError(message, **where)
    if error.code in ("content_filter", "content_policy_violation"):
        return ContentFilterError(message, **where)
    if error.code == "insufficient_quota":
        return BackendError(message, **where)  # waiting does not help
    if status == 400 and error.param and _unsupported(error.code, message):
        rejected = ParameterRejected(message, **where)
        rejected.parameter = error.param
        return rejected
    return error_of_status(
        status,
        message,
        backend=backend,
        request_id=error.request_id,
        seconds=retry_after(error.response.headers),
    )


def _words(error: Any) -> str:
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return str(error.message)


def _unsupported(code: str | None, message: str) -> bool:
    return code in _UNSUPPORTED or "not supported" in message or "nsupported" in message
