"""Google's Gemini models, by Vertex AI or by the developer API."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import (
    BackendError,
    ContextLengthError,
    InvalidArgument,
    MissingDependency,
    UnsupportedFeature,
)
from ..lang.chat_template import ChatTemplate
from ..types import GenRequest
from .calls import Call, Piece, Reply
from .http_errors import error_of_status
from .per_loop import PerLoop
from .planning import Profile
from .provider import ProviderBackend
from .retry import retry_after
from .sdk_errors import no_secrets, transport_error
from .settings import Settings
from .vertex_wire import (
    MAX_TOP_LOGPROBS,
    config_of,
    contents_of,
    profile_of,
    reply_of,
    response_pieces,
)

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from google.genai import Client
    from google.genai.types import GenerateContentResponse

__all__ = ["VertexAI"]

_connections: ContextVar[list[ClientResponse] | None] = ContextVar("connections", default=None)
_TOO_LONG = ("exceeds the maximum number of tokens", "input token count")


class VertexAI(ProviderBackend):
    """A Gemini model.

    With a key and no project the developer API is used, else Vertex AI.

    Args:
        model_name: the model.
        project_id: the Google Cloud project; else the environment's ``GOOGLE_CLOUD_PROJECT``.
        location: the region; else ``GOOGLE_CLOUD_LOCATION``, else the library's own choice.
        api_key: a key; else ``GEMINI_API_KEY`` or ``GOOGLE_API_KEY``, where no project is named.
        safety_settings: a table from harm category to threshold, or a list as in the API.
        chat_template: for ``state.text()``.
        base_url: another address.
        api_version: of the API.
        thinking: the API's ``thinking_config``, as ``{"thinking_level": "low"}``.
        request_args: more of the API's configuration of each call.
        **client_args: :class:`Settings`, and what ``google.genai.Client`` takes, as
            ``credentials`` or ``vertexai``.

    Raises:
        InvalidArgument: a setting is missing or out of its range.
        MissingDependency: the extra ``vertex`` is not installed.
    """

    def __init__(
        self,
        model_name: str,
        project_id: str | None = None,
        location: str | None = None,
        api_key: str | None = None,
        safety_settings: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        chat_template: ChatTemplate | None = None,
        *,
        base_url: str | None = None,
        api_version: str | None = None,
        thinking: Mapping[str, Any] | None = None,
        request_args: Mapping[str, Any] | None = None,
        **client_args: Any,
    ) -> None:
        if not _is_installed():
            raise MissingDependency("google-genai", "vertex")
        if api_key and (project_id or location):
            raise InvalidArgument(
                "api_key", "goes without project_id and location: the project's credentials count"
            )
        settings = Settings.taken_from(client_args)
        if api_key is None:
            project_id = project_id or os.environ.get("GOOGLE_CLOUD_PROJECT")
            location = location or os.environ.get("GOOGLE_CLOUD_LOCATION")
        if project_id is None and api_key is None:
            api_key = os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY")
        if not (project_id or api_key or "credentials" in client_args):
            raise InvalidArgument(
                "project_id",
                "give it, or set GOOGLE_CLOUD_PROJECT; or give api_key, or set GEMINI_API_KEY",
            )
        on_vertex = client_args.pop("vertexai", api_key is None)
        arguments = _request_args(safety_settings, thinking, request_args)
        super().__init__(
            "vertex" if on_vertex else "gemini",
            model_name,
            place=base_url or f"google/{project_id or ''}/{location or ''}",
            key=api_key,
            settings=settings,
            priced_as=base_url or "google",
            fixed=arguments,
            chat_template=chat_template,
        )
        self._request_args = arguments
        self._http = {"base_url": base_url, "api_version": api_version}
        self._client_args = {**client_args, "vertexai": on_vertex}
        if api_key is not None:
            self._client_args["api_key"] = api_key
        else:
            self._client_args |= {"project": project_id, "location": location}
        self._profile = profile_of(model_name)
        self._clients = PerLoop(self._connect, _disconnect)

    @property
    def profile(self) -> Profile:
        """What the model takes."""
        return self._profile

    def check(self, request: GenRequest) -> None:
        """Refuse what this model cannot do; see :meth:`Backend.check`."""
        super().check(request)
        if (request.sampling.top_logprobs_num or 0) > MAX_TOP_LOGPROBS:
            raise UnsupportedFeature(
                self.name, f"top_logprobs_num above {MAX_TOP_LOGPROBS}", "ask for fewer"
            )

    async def prepare(self) -> None:
        """Make the client; its import takes long."""
        await self._clients.get()

    async def ask(self, call: Call) -> Reply:
        """One call without streaming."""
        arguments = self._arguments(call)
        client = await self._clients.get()
        with self.translating():
            async with asyncio.timeout(self.settings.timeout):
                found = await client.aio.models.generate_content(**arguments)
        return reply_of(found, call, self.name)

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """One call, streamed; it is given up when nothing comes for too long."""
        arguments = self._arguments(call)
        client = await self._clients.get()
        with self.translating():
            async with asyncio.timeout(self.settings.timeout):
                opened: Any = await client.aio.models.generate_content_stream(**arguments)
            connections: list[ClientResponse] = []
            try:
                while (found := await self._next(opened, connections)) is not None:
                    for piece in response_pieces(found, self.name):
                        yield piece
            finally:  # the library leaves this to the garbage collector
                for connection in connections:
                    connection.close()
                await opened.aclose()

    async def _next(
        self, stream: Any, connections: list[ClientResponse]
    ) -> GenerateContentResponse | None:
        """The next part of a stream; notes the connections that are made for it."""
        token = _connections.set(connections)
        try:
            async with asyncio.timeout(self.settings.timeout):
                found: GenerateContentResponse | None = await anext(stream, None)
                return found
        finally:
            _connections.reset(token)

    def _arguments(self, call: Call) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "contents": contents_of(call.messages, self.name),
            "config": config_of(call, self._request_args),
        }

    # -- the client --------------------------------------------------------------------------

    async def _connect(self) -> Client:
        genai = await asyncio.to_thread(import_module, "google.genai")
        options: dict[str, Any] = {k: v for k, v in self._http.items() if v is not None}
        options["retry_options"] = {"attempts": 1}
        if find_spec("aiohttp") is not None:
            import aiohttp

            connector = aiohttp.TCPConnector(limit=self.settings.connections, keepalive_timeout=15)
            tracing = aiohttp.TraceConfig()
            tracing.on_request_end.append(_note_connection)
            options["aiohttp_client"] = aiohttp.ClientSession(
                connector=connector, trust_env=True, trace_configs=[tracing]
            )
        try:
            client: Client = await asyncio.to_thread(self._make_client, genai, options)
        except BaseException:
            if "aiohttp_client" in options:
                await options["aiohttp_client"].close()
            raise
        return client

    def _make_client(self, genai: Any, options: dict[str, Any]) -> Any:
        try:
            return genai.Client(http_options=options, **self._client_args)
        except (TypeError, ValueError) as error:
            raise InvalidArgument("client_args", no_secrets(str(error))) from error

    async def aclose(self) -> None:
        """Close all connections; closing twice is fine."""
        await super().aclose()
        await self._clients.aclose()

    def translated(self, error: Exception) -> BackendError | None:
        """The error of asyncsgl for one of the SDK's; None if it is none of its."""
        errors = import_module("google.genai.errors")
        if isinstance(error, errors.APIError):
            return _status_error(error, self.name)
        if isinstance(error, errors.UnknownApiResponseError):
            said = no_secrets(str(error))
            return BackendError(f"the answer is not JSON: {said}", backend=self.name)
        return transport_error(error, self.name)


async def _note_connection(_session: object, _context: object, ended: Any) -> None:
    connections = _connections.get()
    if connections is not None:
        connections.append(ended.response)


def _is_installed() -> bool:
    try:
        return find_spec("google.genai") is not None
    except ModuleNotFoundError:
        return False


def _request_args(
    safety: Mapping[str, str] | Sequence[Mapping[str, str]] | None,
    thinking: Mapping[str, Any] | None,
    more: Mapping[str, Any] | None,
) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(more or {})
    if thinking is not None:
        arguments["thinking_config"] = dict(thinking)
    if isinstance(safety, Mapping):
        safety = [{"category": name, "threshold": value} for name, value in safety.items()]
    if safety is not None:
        arguments["safety_settings"] = [dict(entry) for entry in safety]
    return arguments


async def _disconnect(client: Client) -> None:
    session = client._api_client._http_options.aiohttp_client  # noqa: SLF001 - it is ours
    await client.aio.aclose()
    if session is not None:
        await session.close()


def _status_error(error: Any, backend: str) -> BackendError:
    status = error.code if isinstance(error.code, int) else 500
    message = no_secrets(error.message or str(error))
    if status == 400 and any(words in message.lower() for words in _TOO_LONG):
        return ContextLengthError(message, backend=backend, status=status)
    if status == 400 and "API key not valid" in message:
        status = 401
    headers = getattr(error.response, "headers", None) or {}
    seconds = retry_after(headers)
    return error_of_status(
        status,
        message,
        backend=backend,
        seconds=_retry_delay(error.details) if seconds is None else seconds,
    )


def _retry_delay(details: Any) -> float | None:
    """The delay in a refusal's body, as ``"17s"``."""
    found = details.get("error", details) if isinstance(details, dict) else {}
    entries = found.get("details") if isinstance(found, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        text = str(entry.get("retryDelay", "")) if isinstance(entry, dict) else ""
        if text.endswith("s"):
            return retry_after({"retry-after": text.removesuffix("s")})
    return None
