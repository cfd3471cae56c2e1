"""The fake server: SGLang's native routes, its forms and its quirks, without a model."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from .faults import Abort, Cut, Drop, Fault, Hang, Refuse, Say, StreamError
from .http import Connection, Dropped, Listener, Request
from .model import Answer, Asked, FakeModel, Mistake, Script

__all__ = ["FakeServer"]

Packets = Literal["events", "pairs"] | int
_DEFAULT_INFO = {"model_path": "fake/model-chat", "is_generation": True}


@dataclass(slots=True)
class _Running:
    """A request under way."""

    aborted: asyncio.Event


class FakeServer:
    """An SGLang server on a free port of 127.0.0.1, for one ``async with``.

    It is as strict as SGLang's: unknown sampling keys, empty prompts and schemas that are not
    text are refused. ``/abort_request`` takes ids by what they begin with. What a pattern of
    ``stop_regex`` matches stays in the text.

    Args:
        answers: as :class:`FakeModel` takes them.
        model: instead of ``answers``, a model with a tokenizer and logprobs of the test's own.
        model_info: what ``/model_info`` says; None for 404.
        old_names: only the routes' old names are there, such as ``/get_model_info``.
        incremental: chunks of a stream bring only what is new.
        packets: ``"events"``: each event in a packet of its own; ``"pairs"``: two in one; a
            number: packets of so many bytes, wherever that cuts.
        done: whether ``[DONE]`` ends a stream.
        line_end: of the lines of events.
        space: whether a space follows ``data:``.
        token_ids: whether answers have ``output_ids``.
        deterministic: whether it says that it draws by seeds.
        first_delay: seconds before the first byte of an answer.
        delay: seconds before each event.
        idle: seconds after which an idle connection is closed.
        notices: whether the end of a request's connection ends the request.
        api_key: refuse requests without it.
        context: for https.

    Attributes:
        faults: taken from its front, one for each ``/generate``; None for none.
        requests: every request that came, in order.
        aborted: the ids that ``/abort_request`` was asked to end, in order.
        given_up: how many requests ended because their client left, or aborted them.
    """

    def __init__(
        self,
        answers: Script = "",
        *,
        model: FakeModel | None = None,
        model_info: Mapping[str, object] | None = _DEFAULT_INFO,
        old_names: bool = False,
        incremental: bool = False,
        packets: Packets = "events",
        done: bool = True,
        line_end: str = "\n",
        space: bool = True,
        token_ids: bool = True,
        deterministic: bool = False,
        first_delay: float = 0.0,
        delay: float = 0.0,
        idle: float = 5.0,
        notices: bool = True,
        api_key: str | None = None,
        context: ssl.SSLContext | None = None,
        faults: Iterable[Fault | None] = (),
    ) -> None:
        self.faults: deque[Fault | None] = deque(faults)
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.given_up = 0
        self._model = model or FakeModel(answers)
        self._info = model_info
        self._old = old_names
        self._incremental = incremental
        self._packets = packets
        self._done = done
        self._line_end = line_end
        self._space = " " if space else ""
        self._token_ids = token_ids
        self._deterministic = deterministic
        self._first_delay = first_delay
        self._delay = delay
        self._notices = notices
        self._key = api_key
        self._scheme = "https" if context is not None else "http"
        self._listener = Listener(self._handle, self._changed, idle, context)
        self._running: dict[str, _Running] = {}
        self._orphans: set[asyncio.Task[None]] = set()
        self._change: asyncio.Future[None] | None = None

    @property
    def url(self) -> str:
        """The server's address."""
        return f"{self._scheme}://127.0.0.1:{self._listener.port}"

    @property
    def running(self) -> int:
        """Requests that are worked on now."""
        return len(self._running)

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return self._listener.open

    @property
    def accepted(self) -> int:
        """Connections that were made so far."""
        return self._listener.accepted

    def generates(self) -> list[Any]:
        """The bodies of the ``/generate`` requests, in order."""
        return [request.json for request in self.requests if request.path == "/generate"]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; it is looked at whenever something changes here."""
        while not condition():
            if self._change is None:
                self._change = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._change)

    def _changed(self) -> None:
        if self._change is not None:
            self._change.set_result(None)
            self._change = None

    async def __aenter__(self) -> Self:
        await self._listener.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for task in self._orphans:
            task.cancel()
        await self._listener.stop()

    # -- routes -----------------------------------------------------------------------------

    async def _handle(self, request: Request, connection: Connection) -> None:
        self.requests.append(request)
        self._changed()
        if self._key and request.headers.get("authorization") != f"Bearer {self._key}":
            await _send(connection, {"error": "Unauthorized"}, 401)
            return
        path, _, query = request.path.partition("?")
        name = path.removeprefix("/").removeprefix("get_")
        if self._old and path in ("/model_info", "/server_info"):
            name = ""
        match name:
            case "generate":
                await self._generate(request, connection)
            case "model_info" if self._info is not None:
                await _send(connection, self._info)
            case "server_info":
                await _send(connection, self._server_info())
            case "v1/tokenize":
                text = self._model.begin + request.json["prompt"]
                tokens = [self._model.id_of(token) for token in self._model.tokenize(text)]
                await _send(connection, {"tokens": tokens, "count": len(tokens)})
            case "abort_request":
                self._abort(request.json)
                await connection.send(b"")
            case "flush_cache":
                await self._flush(connection, query)
            case "start_profile":
                await connection.send(b"Start profiling.\n")
            case "stop_profile":
                await connection.send(b"Stop profiling. This will take some time.\n")
            case _:
                await _send(connection, {"detail": "Not Found"}, 404)

    def _server_info(self) -> dict[str, object]:
        return {
            "incremental_streaming_output": self._incremental,
            "enable_deterministic_inference": self._deterministic,
        }

    async def _flush(self, connection: Connection, query: str) -> None:
        if self._running and "timeout" not in query:
            await connection.send(b"Flush cache failed.\n", 400)
        else:
            await connection.send(b"Cache flushed.\n")

    def _abort(self, body: Mapping[str, Any]) -> None:
        self.aborted.append(body["rid"])
        self._changed()
        for rid, running in self._running.items():
            if body["rid"] and rid.startswith(body["rid"]):
                running.aborted.set()

    # -- generate ---------------------------------------------------------------------------

    async def _generate(self, request: Request, connection: Connection) -> None:
        fault = self.faults.popleft() if self.faults else None
        body = request.json
        rid = body.get("rid")
        name = rid if isinstance(rid, str) else rid[0] if rid else f"server-{len(self.requests)}"
        running = self._running[name] = _Running(asyncio.Event())
        self._changed()
        aborting = asyncio.ensure_future(running.aborted.wait())
        answering = asyncio.ensure_future(self._answered(body, fault, connection))
        try:
            await asyncio.wait((answering, aborting), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.given_up += 1
                return
            answering.result()
        except asyncio.CancelledError:
            if self._notices:
                self.given_up += 1
            else:
                self._outlive(name, running)
            raise
        finally:
            if name not in {task.get_name() for task in self._orphans}:
                self._running.pop(name, None)
            aborting.cancel()
            answering.cancel()
            await asyncio.wait((aborting, answering))
            self._changed()

    def _outlive(self, name: str, running: _Running) -> None:
        """Go on with a request whose client has left, until it is aborted."""

        async def until_aborted() -> None:
            await running.aborted.wait()
            self.given_up += 1
            self._running.pop(name, None)
            self._changed()

        task = asyncio.create_task(until_aborted(), name=name)
        self._orphans.add(task)
        task.add_done_callback(self._orphans.discard)

    async def _answered(
        self, body: Mapping[str, Any], fault: Fault | None, connection: Connection
    ) -> None:
        await asyncio.sleep(self._first_delay)
        if isinstance(fault, Drop | Hang) and fault.after is None:
            await _broken(fault)
        if isinstance(fault, Refuse):
            await connection.send(fault.content(), fault.status, fault.headers)
            return
        if isinstance(fault, Say):
            await connection.send(fault.body)
            return
        if isinstance(fault, StreamError) and not body.get("stream"):
            fields = {"object": "error", "message": fault.message, "code": fault.code}
            await _send(connection, fields, fault.code)
            return
        try:
            asked = Asked.of(body)
            answers = self._model.answers(asked)
        except Mistake as mistake:
            await _send(connection, mistake.body, 400)
            return
        if isinstance(fault, Abort):
            answers = [answer.aborted(fault) for answer in answers]
        if asked.stream:
            await self._streamed(asked, answers, fault, connection)
            return
        results = [answer.result(asked, ids=self._token_ids) for answer in answers]
        await _send(connection, results if asked.listed else results[0])

    async def _streamed(
        self, asked: Asked, answers: Sequence[Answer], fault: Fault | None, connection: Connection
    ) -> None:
        await connection.begin_stream()
        pending = b""
        events = self._events(asked, answers, fault)
        for number, event in enumerate(events):
            if isinstance(fault, Drop | Hang | Cut) and number == fault.after:
                await connection.packet(pending)
                if not isinstance(fault, Cut):
                    await _broken(fault)
                await connection.end_stream()
                return
            await asyncio.sleep(self._delay)
            pending += event
            if self._packets == "pairs" and number % 2 == 0 and number + 1 < len(events):
                continue
            size = self._packets if isinstance(self._packets, int) else len(pending)
            for start in range(0, len(pending), size):
                await connection.packet(pending[start : start + size])
                await asyncio.sleep(0)
            pending = b""
        await connection.end_stream()

    def _events(self, asked: Asked, answers: Sequence[Answer], fault: Fault | None) -> list[bytes]:
        chunks: list[object] = []
        steps = max(answer.steps for answer in answers)
        for step in range(1, steps + 1):
            for index, answer in enumerate(answers):
                if step <= answer.steps:
                    chunk = answer.chunk(
                        asked, step, incremental=self._incremental, ids=self._token_ids
                    )
                    chunks.append({**chunk, "index": index} if asked.listed else chunk)
        if isinstance(fault, StreamError):
            told = {
                "message": fault.message,
                "type": "invalid_request_error",
                "code": fault.code,
                "retryable": fault.code >= 500,
            }
            chunks = [*chunks[: fault.after], {"error": told}]
        said = [json.dumps(chunk, ensure_ascii=False) for chunk in chunks]
        if self._done:
            said.append("[DONE]")
        return [f"data:{self._space}{data}{self._line_end * 2}".encode() for data in said]


async def _broken(fault: Drop | Hang) -> None:
    if isinstance(fault, Drop):
        raise Dropped
    await asyncio.Event().wait()


async def _send(connection: Connection, body: object, status: int = 200) -> None:
    await connection.send(json.dumps(body).encode(), status, {"Content-Type": "application/json"})
