"""What LiteLLM reaches: many providers behind one function."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ..errors import (
    BackendConnectionError,
    BackendError,
    BackendTimeout,
    ContentFilterError,
    ContextLengthError,
    InvalidArgument,
    MissingDependency,
    TruncatedStreamError,
    UsageError,
)
from ..lang.chat_template import ChatTemplate
from .calls import Call, Piece, Reply
from .http_errors import error_of_status
from .limits import MAX_ADAPTIVE
from .openai_models import Learned
from .openai_models import profile_of as openai_profile
from .openai_wire import (
    chat_body,
    chat_pieces,
    chat_reply,
    completion_body,
    completion_pieces,
    completion_reply,
)
from .planning import Profile
from .provider import ProviderBackend
from .retry import retry_after
from .sdk_errors import failed_to_connect, no_secrets, timed_out, transport_error
from .settings import Settings

__all__ = ["LiteLLM"]

_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "AIOHTTP_CONNECTOR_LIMIT": str(MAX_ADAPTIVE),
    "AIOHTTP_CONNECTOR_LIMIT_PER_HOST": str(MAX_ADAPTIVE),
}
"""Read once, by the import: keeps it from the network, and allows as many connections as calls."""
_FIELDS = {
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "stop": ("stop",),
    "seed": ("seed",),
    "frequency_penalty": ("frequency_penalty",),
    "presence_penalty": ("presence_penalty",),
    "logit_bias": ("logit_bias",),
    "logprobs": ("return_logprob", "top_logprobs_num", "return_text_in_logprobs"),
}
_PRICED = {
    "gemini": "google",
    "vertex_ai": "google",
    "bedrock": "aws",
    "together_ai": "together",
    "fireworks_ai": "fireworks",
    "xai": "x-ai",
}
"""Providers that the price table calls otherwise than LiteLLM."""
_HINT = "the model's provider has no such parameter, by LiteLLM's table: leave it out"


class LiteLLM(ProviderBackend):
    """A model that LiteLLM reaches.

    Its streams have a limit: versions up to 1.106 make up an end for a stream that broke off,
    so that a text cut short is not noticed.

    Args:
        model_name: the provider and the model, as ``"together_ai/meta-llama/Llama-3-70b-chat-hf"``.
        api_key: the key; else that provider's variable in the environment.
        chat_template: makes text of messages for completion models, and for ``state.text()``.
        is_chat_model: it takes messages, not a text.
        model: another name of ``model_name``.
        **params: :class:`Settings`, and parameters of each ``litellm.acompletion``.

    Raises:
        InvalidArgument: a setting is missing or out of its range.
        MissingDependency: the extra ``litellm`` is not installed.
        UsageError: at the first call, when the installed release is the compromised one.
    """

    def __init__(
        self,
        model_name: str = "",
        api_key: str | None = None,
        chat_template: ChatTemplate | None = None,
        is_chat_model: bool = True,
        *,
        model: str = "",
        **params: Any,
    ) -> None:
        if find_spec("litellm") is None:
            raise MissingDependency("litellm", "litellm")
        settings = Settings.taken_from(params)
        if model_name and model and model_name != model:
            raise InvalidArgument("model", f"given twice: {model_name!r} and {model!r}")
        name = model_name or model
        provider, _, rest = name.partition("/")
        super().__init__(
            "litellm",
            name,
            place=params.get("api_base") or params.get("base_url") or f"litellm/{provider}",
            key=api_key,
            settings=settings,
            priced_as=_priced_as(params, provider if rest else ""),
            fixed={**params, "chat": is_chat_model},
            chat_template=chat_template,
        )
        self._chat = is_chat_model
        self._params = {**params, "api_key": api_key}
        self._learned = Learned()
        self._library: Any = None
        self._images = True
        self._unknown: set[str] = set()
        self._structured = True

    @property
    def profile(self) -> Profile:
        """What the model takes, by LiteLLM's table once that is loaded."""
        found = openai_profile(
            self.model_name, chat=self._chat, reasoning=False, effort=None, learned=self._learned
        )
        if not self._chat:
            return found
        can = found.capabilities
        native = set(can.native) - self._unknown
        emulated = set(can.emulated)
        hints = {**can.hints, **dict.fromkeys(self._unknown, _HINT)}
        max_stops = found.max_stops
        if "stop" in self._unknown:
            emulated.add("stop")
            max_stops = 0
        native.discard("n")  # LiteLLM mixes up the ends of several streamed answers
        emulated.add("n")
        if not self._structured:
            native.discard("json_schema")
            emulated.add("json_schema")
        if not self._images:
            native.discard("image")
            hints["image"] = "this model takes text only, by LiteLLM's table"
        return replace(
            found,
            capabilities=replace(
                can, native=frozenset(native), emulated=frozenset(emulated), hints=hints
            ),
            max_stops=max_stops,
            max_answers=1,
            dialect=found.dialect if self._structured else None,
        )

    async def prepare(self) -> None:
        """Load the library, and read its table."""
        await self._load()

    async def ask(self, call: Call) -> Reply:
        """One call without streaming."""
        litellm = await self._load()
        with self.translating():
            if self._chat:
                return chat_reply(await litellm.acompletion(**self._body(call)), self.name)
            found = await litellm.atext_completion(**self._body(call))
            return completion_reply(found, self.name)

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """One call, streamed."""
        litellm = await self._load()
        ask = litellm.acompletion if self._chat else litellm.atext_completion
        split: Callable[[Any], Iterator[Piece]] = chat_pieces if self._chat else completion_pieces
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with self.translating():
            chunks = await ask(**self._body(call), **options)
            try:
                async for chunk in chunks:
                    for piece in split(chunk):
                        yield piece
            finally:
                await _closed(chunks)

    def _body(self, call: Call) -> dict[str, Any]:
        if self._chat:
            body = chat_body(
                call, self.model_name, self.name, limit_name="max_tokens", system="system"
            )
        else:
            body = completion_body(call, self.model_name)
        given = {name: value for name, value in self._params.items() if value is not None}
        fixed = {"timeout": self.settings.timeout, "max_retries": 0, "num_retries": 0}
        return {**body, **given, **fixed, "drop_params": False}

    async def _load(self) -> Any:
        """The library, loaded once and off the event loop; its import takes seconds."""
        if self._library is None:
            library = await asyncio.to_thread(_import)
            if self._chat:
                self._read_table(library)
            self._library = library
        return self._library

    def _read_table(self, litellm: Any) -> None:
        """What LiteLLM's table says of the model; what it does not know stays as it was."""
        listed = litellm.get_supported_openai_params(model=self.model_name)
        if listed:
            for parameter, fields in _FIELDS.items():
                if parameter not in listed:
                    self._unknown |= set(fields)
            self._structured = "response_format" in listed
        entry = _entry(litellm.model_cost, self.model_name)
        if entry is not None:
            self._images = bool(entry.get("supports_vision"))
            schemas = entry.get("supports_response_schema")
            self._structured = self._structured and bool(schemas)

    def translated(self, error: Exception) -> BackendError | None:
        """The error of asyncsgl for one of LiteLLM's; None if it is none of its."""
        return translated(error, self.name)


def _entry(table: Mapping[str, Any], model: str) -> Mapping[str, Any] | None:
    """What LiteLLM's table says of ``model``, which it may list without the provider's name."""
    provider, _, rest = model.partition("/")
    found: Mapping[str, Any] | None = table.get(model)
    if found is None and rest in table:
        listed: Mapping[str, Any] = table[rest]
        if str(listed.get("litellm_provider", "")).startswith(provider):
            return listed
    return found


def _priced_as(params: Mapping[str, Any], provider: str) -> str:
    """The provider as price tables call it, or another address that was given."""
    address = params.get("api_base") or params.get("base_url")
    return str(address) if address else _PRICED.get(provider, provider)


def _check_release() -> None:
    """Keep away from the release that stole keys."""
    try:
        release = version("litellm")
    except PackageNotFoundError:
        return
    if release.startswith("1.107."):
        raise UsageError(
            f"litellm {release} was a compromised upload: uninstall it, change the keys of this "
            "machine, and install another release"
        )


def _import() -> Any:
    _check_release()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    litellm: Any = import_module("litellm")
    litellm.suppress_debug_info = True
    return litellm


async def _closed(chunks: Any) -> None:
    """Close a stream; LiteLLM's wrapper has no method for it, what it wraps does."""
    inner = getattr(chunks, "completion_stream", chunks)
    for name in ("aclose", "close"):
        close = getattr(inner, name, None)
        if close is not None:
            done = close()
            if asyncio.iscoroutine(done):
                await done
            return


def translated(error: Exception, backend: str) -> BackendError | None:
    """The error of asyncsgl for one of LiteLLM's; None if it is none of its.

    Args:
        error: what was raised around LiteLLM.
        backend: the backend's name.
    """
    litellm: Any = import_module("litellm")
    message = no_secrets(str(getattr(error, "message", None) or error))
    kinds: Mapping[str, type[BackendError]] = {
        "ContextWindowExceededError": ContextLengthError,
        "ContentPolicyViolationError": ContentFilterError,
        "MidStreamFallbackError": TruncatedStreamError,
        "Timeout": BackendTimeout,
    }
    status = getattr(error, "status_code", None)
    if isinstance(error, import_module("openai").APIError) and timed_out(error):
        return BackendTimeout(message, backend=backend)
    for name, kind in kinds.items():
        theirs = getattr(litellm.exceptions, name, None)
        if theirs is not None and isinstance(error, theirs):
            return kind(message, backend=backend, status=status)
    if failed_to_connect(error):
        return BackendConnectionError(message, backend=backend)
    openai: Any = import_module("openai")
    if isinstance(error, openai.APIStatusError) and isinstance(status, int):
        headers = getattr(error, "litellm_response_headers", None)
        headers = headers or getattr(getattr(error, "response", None), "headers", None)
        return error_of_status(
            status, message, backend=backend, seconds=retry_after(dict(headers or {}))
        )
    if isinstance(error, openai.APIError):
        if isinstance(status, int) and status not in (500, 503) and status >= 400:
            return error_of_status(status, message, backend=backend)
        return BackendConnectionError(message, backend=backend)
    return transport_error(error, backend)
