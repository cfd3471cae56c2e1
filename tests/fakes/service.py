"""A loopback HTTP service with faults on demand, which the fakes of the wires are built on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import jsonschema
from aiohttp import web

from .quota import Quota

FaultKind = Literal[
    "status", "html", "slow", "crowd", "stall", "disconnect", "truncate", "bad_json", "no_answer"
]
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360"
    "606060000000050001a5f645400000000049454e44ae426082"
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Args:
        kind: ``no_answer`` hangs before the first byte, ``stall`` in the middle of a stream;
            ``truncate`` ends a stream cleanly without its end marker.
        status: of a refusal.
        headers: of a refusal.
        code: of a refusal, in the words of the wire.
        message: of a refusal.
        seconds: of ``slow``, before the first byte.
        calls: of ``crowd``, which is answered once so many requests were under way at once.
        details: of a refusal, what else its body has on that wire.
    """

    kind: FaultKind
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    code: str = ""
    message: str = "the fake was told to fail"
    seconds: float = 0.0
    calls: int = 0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Seen:
    """One request that came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    cancelled: bool = False


class Refused(Exception):
    """The service refuses a request."""

    def __init__(
        self, status: int, message: str, headers: dict[str, str] | None = None, **details: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers
        self.details = details


def tokens_of(text: str) -> list[str]:
    """The fake's tokens: words with the white space before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def fit(answer: str, schema: dict[str, Any]) -> str:
    """``answer`` as structured output has it: itself if it fits, else as the one property."""
    candidates: list[Any] = []
    with contextlib.suppress(ValueError):
        candidates.append(json.loads(answer))
    candidates += [{"value": value} for value in (*candidates, answer)]
    for value in candidates:
        try:
            jsonschema.validate(value, schema)
        except jsonschema.ValidationError:
            continue
        return json.dumps(value)
    raise AssertionError(f"the scripted answer {answer!r} does not fit {schema}")


@dataclass(frozen=True)
class Written:
    """What the fake's model wrote."""

    tokens: tuple[str, ...]
    finish: Literal["stop", "length", "matched", "filtered"]
    matched: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def write(
    answer: str, max_tokens: int | None, stops: Sequence[str], schema: dict[str, Any] | None
) -> Written:
    """The answer as a model would write it under these limits."""
    if schema is not None:
        answer = fit(answer, schema)
    found = [(answer.find(stop), stop) for stop in stops if stop in answer]
    at, matched = min(found, default=(-1, None))
    if matched is not None:
        answer = answer[:at]
    tokens = tokens_of(answer)
    if max_tokens is not None and len(tokens) > max_tokens:
        return Written(tuple(tokens[:max_tokens]), "length")
    return Written(tuple(tokens), "stop" if matched is None else "matched", matched)


Answers = str | list[str] | Callable[[dict[str, Any]], str]


class FakeService:
    """One loopback service. Use as ``async with``.

    Attributes:
        answers: one text for every call, a list of one for each, or a function of the body.
        faults: what goes wrong with the next requests, in order; None for nothing.
        seen: every request that came.
        running: requests that are being answered.
        cancelled: requests whose client went away before their end.
        logprob_of: the logprob of each token, where prompts are scored.
        reasoning: what the model thinks before it answers.
        refusal_text: what it says instead of an answer.
        filtered: answers are withheld for their content.
        quota: what is allowed in a minute, by a clock whose seconds are ``tick`` long.
        tick: real seconds.
    """

    def __init__(self, answers: Answers = "Hello world") -> None:
        self.answers = answers
        self.faults: deque[Fault | None] = deque()
        self.seen: list[Seen] = []
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        self._more = asyncio.Condition()
        self.came = asyncio.Event()
        self.gone = asyncio.Event()
        self.logprob_of: dict[str, float] = {}
        self.reasoning = ""
        self.refusal_text = ""
        self.filtered = False
        self.quota: Quota | None = None
        self.tick = 1.0
        self.crashed: Exception | None = None
        self.url = ""
        self._runner: web.AppRunner | None = None

    def routes(self) -> list[web.RouteDef]:
        """The wire's routes."""
        raise NotImplementedError

    def refusal(self, status: int, message: str, details: dict[str, Any]) -> dict[str, Any]:
        """The wire's body of an error."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26)
        app.add_routes(self.routes())
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()
        if self.crashed is not None:
            raise self.crashed

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of all requests, in order."""
        return [seen.body for seen in self.seen]

    def next_answer(self, body: dict[str, Any]) -> str:
        """The script's next answer."""
        if isinstance(self.answers, str):
            return self.answers
        if isinstance(self.answers, list):
            return self.answers.pop(0)
        return self.answers(body)

    def charge(self, tokens: int) -> None:
        """Count a request with so many tokens, prompt and answer together, or refuse it."""
        if self.quota is not None and (seconds := self.quota.take(tokens)):
            wait = {"retry-after-ms": str(round(seconds * self.tick * 1000, 3))}
            raise Refused(429, "Rate limit reached", wait, code="rate_limit_exceeded")

    async def handle(
        self, request: web.Request, answer: Callable[[web.Request, Seen, Fault | None], Any]
    ) -> web.StreamResponse:
        """Answer one request, or fail as told."""
        body = await request.json()
        seen = Seen(request.path, {k.lower(): v for k, v in request.headers.items()}, body)
        self.seen.append(seen)
        fault = self.faults.popleft() if self.faults else None
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.came.set()
        try:
            async with self._more:
                self._more.notify_all()
            if fault is not None:
                failed = await self._fail(request, fault)
                if failed is not None:
                    return failed
            response: web.StreamResponse = await answer(request, seen, fault)
            return response
        except Refused as error:
            body = self.refusal(error.status, error.message, error.details)
            return web.json_response(body, status=error.status, headers=error.headers)
        except (AssertionError, ValueError, LookupError, TypeError) as error:
            self.crashed = error
            raise
        except (asyncio.CancelledError, ConnectionResetError):
            seen.cancelled = True
            self.cancelled += 1
            self.gone.set()
            raise
        finally:
            self.running -= 1

    async def _fail(self, request: web.Request, fault: Fault) -> web.StreamResponse | None:
        match fault.kind:
            case "status":
                details = ({"code": fault.code} if fault.code else {}) | fault.details
                body = self.refusal(fault.status, fault.message, details)
                return web.json_response(body, status=fault.status, headers=fault.headers)
            case "html":
                page = "<html><body>Bad gateway</body></html>"
                return web.Response(status=fault.status, text=page, content_type="text/html")
            case "slow":
                await asyncio.sleep(fault.seconds)
            case "crowd":
                async with self._more:
                    await self._more.wait_for(lambda: self.most_running >= fault.calls)
            case "no_answer":
                await asyncio.Event().wait()
            case "disconnect" if not await self.is_stream(request):
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            case "bad_json" if not await self.is_stream(request):
                return web.Response(text='{"half', content_type="application/json")
            case _:
                pass
        return None

    async def is_stream(self, request: web.Request) -> bool:
        """Whether the answer is to be streamed."""
        body = await request.json()
        return bool(body.get("stream"))

    async def stream(
        self, request: web.Request, events: Sequence[str], fault: Fault | None
    ) -> web.StreamResponse:
        """Send server-sent events; a fault strikes after the first half of them."""
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        kind = fault.kind if fault is not None else None
        half = max(1, len(events) // 2)
        for index, event in enumerate(events):
            if index == half and kind in ("truncate", "disconnect", "stall", "bad_json"):
                if kind == "truncate":
                    break
                if kind == "disconnect":
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if kind == "stall":
                    await asyncio.Event().wait()
                event = event[:-4]
            await response.write(f"{event}\n\n".encode())
            await asyncio.sleep(0)
        await response.write_eof()
        return response
