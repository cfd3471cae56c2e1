"""Anthropic's Claude models."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import (
    BackendError,
    ContextLengthError,
    InvalidArgument,
    MissingDependency,
)
from ..lang.chat_template import ChatTemplate
from .anthropic_models import profile_of, traits_of
from .anthropic_wire import (
    CACHED_CHARACTERS,
    Pieces,
    message_body,
    message_reply,
    shared_prefix,
    size_of,
)
from .calls import Assembly, Call, ParameterRejected, Piece, Reply
from .http_errors import error_of_status
from .per_loop import PerLoop
from .planning import Profile
from .provider import ProviderBackend
from .retry import retry_after
from .sdk_errors import no_secrets
from .sent_ahead import SentAhead
from .settings import Settings
from .stainless import as_it_is, make_client, sdk_error

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

__all__ = ["Anthropic"]

_SPENT = frozenset({"contract_spend_limit_reached", "enforced_spend_limit_reached"})
_TELLTALES = {
    "temperature": "sampling",
    "top_p": "sampling",
    "top_k": "sampling",
    "prefill": "prefill",
    "must end with a user message": "prefill",
    "output_config": "structured",
    "output_format": "structured",
}
"""Words of a refusal that tell which trait a model has not."""


class Anthropic(ProviderBackend):
    """A model of Anthropic.

    Args:
        model_name: the model.
        api_key: the key; else the environment's ``ANTHROPIC_API_KEY``.
        chat_template: for ``state.text()``.
        sampling: the model takes temperature, top_p and top_k; None to tell by its name.
        prefill: it continues a turn that has begun; None to tell by its name. Where it does
            not, what the turn already says is folded into the user's turn.
        cache: let the service keep long prompts that calls share, and send the first of such
            calls ahead of the others.
        request_args: more parameters of each call, as ``{"thinking": {...}}``.
        **client_args: :class:`Settings`, and what ``anthropic.AsyncAnthropic`` takes.

    Raises:
        InvalidArgument: a setting is missing or out of its range.
        MissingDependency: the extra ``anthropic`` is not installed.
    """

    def __init__(
        self,
        model_name: str,
        api_key: str | None = None,
        chat_template: ChatTemplate | None = None,
        *,
        sampling: bool | None = None,
        prefill: bool | None = None,
        cache: bool = True,
        request_args: Mapping[str, Any] | None = None,
        **client_args: Any,
    ) -> None:
        if find_spec("anthropic") is None:
            raise MissingDependency("anthropic", "anthropic")
        settings = Settings.taken_from(client_args)
        api_key = api_key or os.environ.get("ANTHROPIC_API_KEY")
        others = {"auth_token", "credentials", "config", "profile"} & set(client_args)
        if not (api_key or others or os.environ.get("ANTHROPIC_AUTH_TOKEN")):
            raise InvalidArgument("api_key", "give it, or set ANTHROPIC_API_KEY")
        base_url = client_args.get("base_url") or os.environ.get("ANTHROPIC_BASE_URL")
        super().__init__(
            "anthropic",
            model_name,
            place=base_url or "anthropic",
            key=api_key,
            settings=settings,
            priced_as=base_url or "anthropic",
            fixed={**(request_args or {}), "sampling": sampling, "prefill": prefill},
            chat_template=chat_template,
        )
        self._request_args = dict(request_args or {})
        traits = traits_of(model_name)
        self._traits = replace(
            traits,
            sampling=traits.sampling if sampling is None else sampling,
            prefill=traits.prefill if prefill is None else prefill,
        ).told(self._request_args.get("thinking"))
        self._client_args = {"open_telemetry": False, **client_args, "api_key": api_key}
        self._cache = cache
        self._ahead = SentAhead()
        self._clients = PerLoop(self._connect, _disconnect)

    @property
    def profile(self) -> Profile:
        """What the model takes."""
        return _profile_of(self._traits)

    def learn(self, rejected: ParameterRejected) -> bool:
        """Do without the trait from now on, if the model was believed to have it."""
        trait = rejected.parameter
        if not getattr(self._traits, trait):
            return False
        self._traits = replace(self._traits, **{trait: False})
        return True

    async def prepare(self) -> None:
        """Make the client; its import takes long."""
        await self._clients.get()

    async def ask(self, call: Call) -> Reply:
        """One call without streaming; one that leads others is streamed, to let them go early."""
        async with self._in_turn(call) as begun:
            if begun is not None:
                return await self._read(call, begun)
            client = await self._clients.get()
            with self.translating():
                message = await client.messages.create(**self._body(call))
        return message_reply(message, call, self.name)

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """One call, streamed."""
        async with self._in_turn(call) as begun, aclosing(self._streamed_call(call)) as pieces:
            async for piece in pieces:
                if begun is not None:
                    begun()
                yield piece

    async def _read(self, call: Call, begun: Callable[[], None]) -> Reply:
        assembly = Assembly(self.name, 1)
        async with aclosing(self._streamed_call(call)) as pieces:
            async for piece in pieces:
                begun()
                assembly.add(piece)
        return assembly.reply()

    async def _streamed_call(self, call: Call) -> AsyncGenerator[Piece, None]:
        client = await self._clients.get()
        split = Pieces(call)
        with self.translating():
            async with await client.messages.create(**self._body(call), stream=True) as events:
                async for event in events:
                    piece = split.take(event)
                    if piece is not None:
                        yield piece

    def _body(self, call: Call) -> dict[str, Any]:
        cached = self._cache and size_of(call.messages) >= CACHED_CHARACTERS
        body = message_body(call, self.model_name, self.name, cached=cached)
        body = {**body, "timeout": self.settings.timeout, **self._request_args}
        return as_it_is(body, model=self.model_name, max_tokens=body["max_tokens"], messages=())

    @asynccontextmanager
    async def _in_turn(self, call: Call) -> AsyncGenerator[Callable[[], None] | None, None]:
        """Wait where another call with the same prompt leads; see :meth:`SentAhead.turn`."""
        prefix = self._prefix(call) if self._cache else None
        if prefix is None:
            yield None
            return
        async with self._ahead.turn(prefix) as begun:
            yield begun

    def _prefix(self, call: Call) -> Hashable | None:
        """What the service keeps of this prompt; None if it is too short to be kept."""
        if size_of(call.messages) < CACHED_CHARACTERS:
            return None
        system = [message for message in call.messages if message.role == "system"]
        turns = [message for message in call.messages if message.role != "system"]
        kept = (*system, *shared_prefix(turns))
        return hash(kept) if size_of(kept) >= CACHED_CHARACTERS else None

    # -- the client --------------------------------------------------------------------------

    def translated(self, error: Exception) -> BackendError | None:
        """The error of asyncsgl for one of the SDK's; None if it is none of its."""
        return sdk_error(import_module("anthropic"), error, self.name, _status_error)

    async def _connect(self) -> AsyncAnthropic:
        client: AsyncAnthropic = await asyncio.to_thread(
            make_client, "anthropic", "AsyncAnthropic", self._client_args, self.settings
        )
        return client

    async def aclose(self) -> None:
        """Close all connections; closing twice is fine."""
        await super().aclose()
        await self._clients.aclose()


_profile_of = functools.lru_cache(maxsize=16)(profile_of)


async def _disconnect(client: AsyncAnthropic) -> None:
    await client.close()


def _status_error(error: Any, backend: str) -> BackendError:
    status: int = error.status_code
    message = no_secrets(error.api_message or error.message)
    where: dict[str, Any] = {"backend": backend, "request_id": error.request_id, "status": status}
    if error.error_code in _SPENT or status == 402:
        return BackendError(message, **where)  # waiting does not help
    if status in (400, 413) and "prompt is too long" in message:
        return ContextLengthError(message, **where)
    if status == 400:
        trait = next((trait for words, trait in _TELLTALES.items() if words in message), None)
        if trait is not None:
            rejected = ParameterRejected(message, **where)
            rejected.parameter = trait
            return rejected
    return error_of_status(
        status,
        message,
        backend=backend,
        request_id=error.request_id,
        seconds=retry_after(error.response.headers),
    )
