"""An SGLang server, this project's or SGLang's own, as a backend."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from base64 import b64encode
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import unquote

from ..errors import BackendError, BadRequestError, InvalidArgument, UnsupportedFeature
from ..lang.chat_template import ChatTemplate, get_chat_template
from ..sampling import SAMPLING_FIELDS
from ..types import Delta, Generation, GenRequest, Media, Scores, Timings
from .base import Backend, Capabilities
from .endpoint_info import ModelInfo
from .endpoint_link import Link, drained
from .endpoint_select import ChoiceScorer
from .endpoint_stream import StreamAssembly
from .endpoint_ways import ServerWays
from .endpoint_wire import (
    Json,
    abortable,
    encoded,
    generate_body,
    generation_of,
    results_of,
    with_rids,
)
from .http import HTTPSettings, most_connections, split_user_info
from .http_connect import connect
from .per_loop import PerLoop
from .retry import RetryPolicy, cooldown_for, retried, retried_stream
from .sse import DONE, EventParser

__all__ = ["RuntimeEndpoint"]

T = TypeVar("T")
Notes = tuple[str, ...]
_log = logging.getLogger("asyncsgl")

_CAPABILITIES = Capabilities(
    native=frozenset(
        (
            "raw_text",
            "chat",
            "continue_assistant",
            "select",
            "regex",
            "json_schema",
            "ebnf",
            "image",
            *SAMPLING_FIELDS,
        )
    ),
    emulated=frozenset(("reasoning",)),
    hints={"video": "append its frames as images"},
    wants_text=True,
)
_FIRST_IS_CERTAIN = (
    "unconditional: a choice's first token counts as certain, for nothing precedes it"
)


class RuntimeEndpoint(Backend):
    """An SGLang server, reached by HTTP. Making one sends nothing.

    Connections are made on first use, in each event loop its own, and kept for a few seconds.
    With the extra ``http`` many of them cost little; without it they are httpx's, at most 100.

    Args:
        base_url: such as ``"http://localhost:30000"``; user info in it is sent as basic
            authentication and never shown.
        api_key: sent as bearer token, never shown.
        verify: a CA file or folder; False to trust any certificate.
        chat_template_name: a named template instead of the server's own.
        timeout: seconds without a byte from the server after which a call fails. An answer
            that is not streamed comes in one piece.
        max_retries: tries after the first, of calls that failed and may succeed later.
        max_connections: at once in each event loop; more calls wait. None for as many as
            the process may well open, at most 1,000.

    Attributes:
        base_url: the server's address, without user info.

    Raises:
        InvalidArgument: an argument is out of its range.
    """

    name = "endpoint"
    keeps_prefixes = True

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | str = True,
        chat_template_name: str | None = None,
        *,
        timeout: float = 600.0,
        max_retries: int = 4,
        max_connections: int | None = None,
    ) -> None:
        if timeout <= 0:
            raise InvalidArgument("timeout", f"must be above 0, got {timeout!r}")
        if max_connections is not None and max_connections < 1:
            raise InvalidArgument("max_connections", f"must be at least 1, got {max_connections}")
        self.base_url, user_info = split_user_info(base_url)
        if chat_template_name is not None:
            self.chat_template = get_chat_template(chat_template_name)
        self._policy = RetryPolicy(max_retries)
        self._settings = HTTPSettings(
            self.base_url,
            _authorization(api_key, user_info),
            verify,
            timeout,
            max_connections or most_connections(),
        )
        self.default_concurrency = min(self._settings.max_connections, 256)
        self._cooldown = cooldown_for(self.name, api_key or user_info, self.base_url)
        self._links = PerLoop(functools.partial(_make_link, self._settings, self.name), Link.aclose)
        self._info: ModelInfo | None = None
        self._ways = ServerWays(self.name)
        self._warned = False
        self._counts: Counter[str] = Counter()

    @property
    def capabilities(self) -> Capabilities:
        """What SGLang's servers can do; whether images, the model decides."""
        return _CAPABILITIES

    # -- requests -------------------------------------------------------------------------

    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request; see :meth:`Backend.generate`."""
        text, info = await self._prompt(request)
        notes = await self._notes(request, text, info) if _is_rare(request, text) else ()
        start = time.perf_counter()
        call = functools.partial(self._generated, request, text, info, notes, start)
        return await self._retried(call)

    async def _generated(
        self, request: GenRequest, text: str, info: ModelInfo, notes: Notes, start: float
    ) -> Generation:
        """One try."""
        rid = os.urandom(16).hex()
        body = generate_body(request, text, rid, stream=False)
        results = await self._results(body, request, request.sampling.n or 1)
        total = time.perf_counter() - start
        return generation_of(
            request, results, rid=rid, model=info.model_path, total=total, emulated=notes
        )

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; see :meth:`Backend.stream`."""
        text, info = await self._prompt(request)
        notes = await self._notes(request, text, info) if _is_rare(request, text) else ()
        start = time.perf_counter()
        first: float | None = None
        calls = retried_stream(
            lambda: self._stream_once(request, text, cuts=not info.cuts_patterns),
            self._policy,
            cooldown=self._cooldown,
            on_retry=self._on_retry,
        )
        async with aclosing(calls) as pieces:
            async for piece in pieces:
                if isinstance(piece, Delta):
                    if first is None:
                        first = time.perf_counter() - start
                    yield piece
                    continue
                rid, results = piece
                total = time.perf_counter() - start
                generation = generation_of(
                    request,
                    results,
                    rid=rid,
                    model=info.model_path,
                    total=total,
                    first_token=first,
                    emulated=notes,
                )
                yield Delta(generation=generation)

    async def _stream_once(
        self, request: GenRequest, text: str, *, cuts: bool
    ) -> AsyncGenerator[Delta | tuple[str, list[Json]], None]:
        """One try: its deltas, then the id and the whole results."""
        link = await self._links.get()
        rid = os.urandom(16).hex()
        body = generate_body(request, text, rid, stream=True)
        answer = StreamAssembly(request, backend=self.name, rid=rid, cuts=cuts)
        events = EventParser()
        self._counts["requests"] += 1
        content = await encoded(body, request)
        async with link.stream("/generate", content, rid=abortable(body)) as chunks:
            async for chunk in chunks:
                ended = False
                for data in events.push(chunk):
                    if data == DONE:
                        ended = True
                        break
                    delta = answer.add(data)
                    if delta.text or delta.logprobs:
                        yield delta
                if ended or answer.finished:
                    break
            await drained(chunks)
        yield rid, answer.results()

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score all choices in one batch; see :meth:`Backend.score`."""
        text, info = await self._prompt(request)
        start = time.perf_counter()

        async def ask(body: Json, count: int) -> list[Json]:
            async def call() -> list[Json]:
                return await self._results(with_rids(body), request, count)

            return await self._retried(call)

        scorer = ChoiceScorer(ask, info.begin)
        scored = await scorer.score(text, choices, unconditional=unconditional)
        return Scores(
            scored,
            usage=scorer.usage,
            emulated=(_FIRST_IS_CERTAIN,) if unconditional and not info.begin else (),
            timings=Timings(time.perf_counter() - start),
        )

    async def cache_prefix(self, request: GenRequest) -> None:
        """Compute the request's prompt and leave it in the server's prefix cache."""
        sampling = replace(request.sampling, max_tokens=0, min_tokens=None, n=None)
        await self.generate(replace(request, sampling=sampling, constraint=None))

    async def _results(self, body: Json, request: GenRequest, count: int) -> list[Json]:
        """Post one ``/generate``; the results of its answer."""
        link = await self._links.get()
        self._counts["requests"] += 1
        rid = abortable(body)
        answer = await link.ask("POST", "/generate", await encoded(body, request), rid=rid)
        return results_of(answer, count, backend=self.name, request_id=rid)

    def _retried(self, call: Callable[[], Awaitable[T]]) -> Coroutine[Any, Any, T]:
        return retried(call, self._policy, cooldown=self._cooldown, on_retry=self._on_retry)

    def _on_retry(self, retry: int, error: BackendError, delay: float) -> None:
        self._counts["retries"] += 1
        _log.info("retry %d of %s in %.2f s: %s", retry + 1, self.base_url, delay, error)

    async def _notes(self, request: GenRequest, text: str, info: ModelInfo) -> Notes:
        """What the server does not do as it is asked; refuses what would end it."""
        if not text:
            await self._ways.needs_text(self._call)
        notes = []
        if request.sampling.stop_regex and not info.cuts_patterns:
            notes.append("stop_regex: the text is cut here")
        if request.sampling.seed is not None and await self._ways.ignores_seeds(self._call):
            notes.append("seed: ignored, the server runs without --enable-deterministic-inference")
        return tuple(notes)

    async def _call(self, method: str, path: str, body: bytes | None) -> bytes:
        async def call() -> bytes:
            link = await self._links.get()
            return await link.ask(method, path, body)

        return await self._retried(call)

    async def _prompt(self, request: GenRequest) -> tuple[str, ModelInfo]:
        """The prompt's text, and the model; refuses images for a model without eyes."""
        assert request.text is not None, "this backend wants text"
        info = self._info or await self._model_info()
        if info.sees_images is False and any(
            isinstance(part, Media) for message in request.messages for part in message.parts
        ):
            raise UnsupportedFeature(
                self.name, "image", f"the model {info.model_path!r} takes only text"
            )
        if not self._warned and any(message.role for message in request.messages):
            self._warn(info)
        return request.text or info.begin, info

    def _warn(self, info: ModelInfo) -> None:
        """Say once that a prompt with roles may not have the form that the model knows."""
        self._warned = True
        if self.chat_template is None and info.template is None:
            _log.warning(
                "%s tells no chat template and none is known for %r: roles are written as "
                "'USER:' and 'ASSISTANT:'; pass chat_template_name=",
                self.base_url,
                info.model_path,
            )

    # -- the server -------------------------------------------------------------------------

    async def chat_template_in_use(self) -> ChatTemplate:
        """The template that was set, or the server's own, or the one that fits the model's name."""
        if self.chat_template is not None:
            return self.chat_template
        info = self._info or await self._model_info()
        return info.template or get_chat_template("default")

    async def get_server_info(self) -> dict[str, object]:
        """The server's settings and state; see :meth:`Backend.get_server_info`.

        Raises:
            BackendError: the server refused, failed, or could not be reached.
        """
        info = await self._get_json("/server_info", "/get_server_info")
        if not isinstance(info, dict):
            raise BackendError("the server says nothing of itself", backend=self.name)
        return info

    async def flush_cache(self, *, wait: bool = False) -> bool:
        """Empty the server's prefix cache; see :meth:`Backend.flush_cache`.

        Raises:
            BackendError: the server refused, failed, or could not be reached.
        """
        seconds = min(0.9 * self._settings.timeout, 3600.0)
        try:
            await self._post(f"/flush_cache?timeout={seconds:g}" if wait else "/flush_cache")
        except BadRequestError:
            return False
        return True

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        """Begin to record; see :meth:`Backend.start_profile`.

        Raises:
            BackendError: the server refused, failed, or could not be reached.
        """
        given = {"output_dir": output_dir, "num_steps": num_steps}
        asked = {name: value for name, value in given.items() if value is not None}
        return await self._post("/start_profile", json.dumps(asked).encode())

    async def stop_profile(self) -> str:
        """End the recording; see :meth:`Backend.stop_profile`. Raises as :meth:`start_profile`."""
        return await self._post("/stop_profile")

    def statistics(self) -> Mapping[str, float]:
        """``requests`` sent and ``retries`` among them, so far."""
        return {"requests": self._counts["requests"], "retries": self._counts["retries"]}

    async def aclose(self) -> None:
        """Close the connections of all event loops; closing twice is fine."""
        await self._links.aclose()

    def __repr__(self) -> str:
        return f"<RuntimeEndpoint {self.base_url!r}>"

    async def _model_info(self) -> ModelInfo:
        """What the server says of its model; asked for once."""
        if self._info is None:
            link = await self._links.get()
            async with link.info_lock:
                if self._info is None:
                    body = await self._get_json("/model_info", "/get_model_info")
                    self._info = ModelInfo.of(body)
        return self._info

    async def _get_json(self, *paths: str) -> object:
        async def call() -> object:
            link = await self._links.get()
            found: object = await link.get_json(*paths)
            return found

        return await self._retried(call)

    async def _post(self, path: str, body: bytes = b"{}") -> str:
        link = await self._links.get()
        answer = await link.ask("POST", path, body)
        return answer.decode("utf-8", "replace").strip()


async def _make_link(settings: HTTPSettings, backend: str) -> Link:
    return Link(await connect(settings), backend)


def _is_rare(request: GenRequest, text: str) -> bool:
    """Whether servers may differ in what they do with a request."""
    sampling = request.sampling
    return not text or sampling.seed is not None or bool(sampling.stop_regex)


def _authorization(api_key: str | None, user_info: str | None) -> dict[str, str]:
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise InvalidArgument("api_key", "must be printable ASCII")
        return {"Authorization": f"Bearer {api_key}"}
    if user_info is not None:
        token = b64encode(unquote(user_info).encode()).decode()
        return {"Authorization": f"Basic {token}"}
    return {}
