"""OpenAI, Azure OpenAI, and servers that speak their language."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
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
from ..types import GenRequest
from .calls import Call, ParameterRejected, Piece, Reply
from .http_errors import error_of_status
from .openai_account import Account, Provider
from .openai_models import Learned, is_completion_model, profile_of
from .openai_models import is_reasoning_model as reasons_by_name
from .openai_select import SelectingBackend
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
from .retry import retry_after
from .sdk_errors import no_secrets
from .settings import Settings
from .stainless import as_it_is, make_client, sdk_error
from .token_walk import Tokenizer

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["OpenAI"]

_UNSUPPORTED = frozenset({"unsupported_parameter", "unsupported_value"})


class OpenAI(SelectingBackend):
    """A model of OpenAI, of Azure OpenAI, or of any server with the same API.

    Args:
        model_name: the model, or the deployment's name on Azure.
        is_chat_model: it takes messages; None to tell by its name.
        chat_template: makes text of messages for completion models, and for ``state.text()``.
        is_azure: use Azure OpenAI. With ``api_version`` the address has the deployment in it;
            without, the newer form ``/openai/v1/``.
        api_key: the key, or a function that gives one for each call; else the environment's
            ``OPENAI_API_KEY`` or ``AZURE_OPENAI_API_KEY``.
        base_url: another server's address.
        azure_endpoint: the resource's address; else ``AZURE_OPENAI_ENDPOINT``.
        api_version: of the Azure API.
        azure_ad_token_provider: gives tokens in place of a key; a plain function runs in a
            thread.
        is_reasoning_model: it reasons before it answers; None to tell by its name.
        reasoning_effort: sent with each call, where given.
        tokenizer: the model's, for ``select`` on completion models whose server does not echo
            prompts; else tiktoken's, where that is installed and knows the model.
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
        api_key: str | Provider | None = None,
        base_url: str | None = None,
        *,
        azure_endpoint: str | None = None,
        api_version: str | None = None,
        azure_ad_token_provider: Provider | None = None,
        is_reasoning_model: bool | None = None,
        reasoning_effort: str | None = None,
        tokenizer: Tokenizer | None = None,
        request_args: Mapping[str, Any] | None = None,
        **client_args: Any,
    ) -> None:
        if find_spec("openai") is None:
            raise MissingDependency("openai", "openai")
        settings = Settings.taken_from(client_args)
        if is_azure:
            account = Account.of_azure(
                api_key, base_url, azure_endpoint, api_version, azure_ad_token_provider, client_args
            )
        elif azure_endpoint or api_version or azure_ad_token_provider:
            raise InvalidArgument("is_azure", "must be True for what only Azure OpenAI has")
        else:
            account = Account.of_openai(api_key, base_url, client_args)
        chat = not is_completion_model(model_name) if is_chat_model is None else is_chat_model
        super().__init__(
            account.name,
            model_name,
            place=account.place,
            key=account.key,
            settings=settings,
            priced_as=account.priced_as,
            fixed={**(request_args or {}), "effort": reasoning_effort, "chat": chat},
            chat_template=chat_template,
        )
        self._account = account
        self.chat = chat
        named = reasons_by_name(model_name)
        self._reasons = named if is_reasoning_model is None else is_reasoning_model
        self._effort = reasoning_effort
        self._request_args = dict(request_args or {})
        self.tokenizer = tokenizer
        self.learned = Learned()
        self._profile: Profile | None = None
        self._clients = PerLoop(self._connect, _disconnect)

    @property
    def profile(self) -> Profile:
        """What the model takes."""
        if self._profile is None:
            self._profile = profile_of(
                self.model_name,
                chat=self.chat,
                reasoning=self._reasons,
                effort=self._effort,
                learned=self.learned,
            )
        return self._profile

    def learn(self, rejected: ParameterRejected) -> bool:
        """Do without the parameter from now on, where that can be done."""
        self._profile = None
        return self.learned.take(rejected)

    def check(self, request: GenRequest) -> None:
        """Refuse what this model cannot do; see :meth:`Backend.check`."""
        super().check(request)
        most = MAX_TOP_LOGPROBS if self.chat else 5
        if (request.sampling.top_logprobs_num or 0) > most:
            raise UnsupportedFeature(self.name, f"top_logprobs_num above {most}", "ask for fewer")

    async def prepare(self) -> None:
        """Make the client; its import takes long."""
        await self.client()

    async def ask(self, call: Call) -> Reply:
        """One call without streaming."""
        client = await self.client()
        with self.translating():
            if self.chat:
                body = self._body(call)
                return chat_reply(await client.chat.completions.create(**body), self.name)
            return completion_reply(await client.completions.create(**self._body(call)), self.name)

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """One call, streamed."""
        client = await self.client()
        body = self._body(call, streamed=True)
        with self.translating():
            if self.chat:
                chunks: Any = await client.chat.completions.create(**body, stream=True)
                split: Callable[[Any], Iterator[Piece]] = chat_pieces
            else:
                chunks = await client.completions.create(**body, stream=True)
                split = completion_pieces
            async with chunks:
                async for chunk in chunks:
                    for piece in split(chunk):
                        yield piece

    def _body(self, call: Call, *, streamed: bool = False) -> dict[str, Any]:
        if self.chat:
            limit = self.learned.limit_name or (
                "max_completion_tokens" if self._reasons else "max_tokens"
            )
            system = "developer" if self._reasons and self._account.hosted else "system"
            body = chat_body(call, self.model_name, self.name, limit_name=limit, system=system)
            if self._effort is not None:
                body["reasoning_effort"] = self._effort
        else:
            body = completion_body(call, self.model_name)
        if streamed and "stream_options" not in self.learned.wire:
            body["stream_options"] = {"include_usage": True}
            if self._account.hosted and self.chat:
                body["stream_options"]["include_obfuscation"] = False
        prompt = {"messages": ()} if self.chat else {"prompt": ""}
        return as_it_is({**body, **self._request_args}, model=self.model_name, **prompt)

    # -- the client --------------------------------------------------------------------------

    def translated(self, error: Exception) -> BackendError | None:
        """The error of asyncsgl for one of the SDK's; None if it is none of its."""
        return sdk_error(import_module("openai"), error, self.name, _status_error)

    async def client(self) -> AsyncOpenAI:
        """The SDK's client on the running loop, made at the first call."""
        return await self._clients.get()

    async def _connect(self) -> AsyncOpenAI:
        client: AsyncOpenAI = await asyncio.to_thread(
            make_client,
            "openai",
            "AsyncAzureOpenAI" if self._account.by_deployment else "AsyncOpenAI",
            self._account.arguments,
            self.settings,
        )
        return client

    async def aclose(self) -> None:
        """Close all connections; closing twice is fine."""
        await super().aclose()
        await self._clients.aclose()


async def _disconnect(client: AsyncOpenAI) -> None:
    await client.close()


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
