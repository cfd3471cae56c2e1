"""What the routes share: the engine, its limits, and what happened."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from ..config import ResolvedConfig
from ..engine import AsyncEngine
from ..errors import EngineError, InvalidRequest, PromptTooLong
from ..images import Prompt
from ..request import Completion, Delta, Request
from ..statistics import Statistics
from .auth import Keys
from .batch_runner import Answer, BatchRunner
from .batch_store import BatchStore
from .calls import complete, stream
from .failures import Failure, failure_of
from .history import History
from .media import MediaReader
from .metrics import Metrics
from .settings import ServerSettings

__all__ = ["Incident", "Service"]

T = TypeVar("T")

_INLINE_CHARACTERS = 4096
"""Texts up to this length are tokenised on the event loop: that takes less than a thread."""


def _version() -> str:
    try:
        return version("asyncsgl")
    except PackageNotFoundError:
        return "unknown"


VERSION = _version()
"""Read once, for it takes a look at files."""


@dataclass(frozen=True, slots=True)
class Incident:
    """An error that a client got.

    Args:
        at: seconds since 1970.
        route: method and path.
        status: of the answer.
        message: of the answer.
    """

    at: float
    route: str
    status: int
    message: str


class Service:
    """An engine behind HTTP.

    Args:
        engine: started or not; it is started when first needed and never closed here.
        settings: what is allowed.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.model_path = engine.asked.model_path
        self.model_name = settings.served_model_name or self.model_path
        self.keys = Keys(settings)
        self.media = MediaReader(settings)
        self.metrics = Metrics(self.model_name, self._snapshot, self.throughput)
        self.incidents: deque[Incident] = deque(maxlen=50)
        self.history = History(self.statistics)
        self.started_at = time.time()
        self.version = VERSION
        self.draining = False
        self.starting = False
        self.answer: Answer | None = None
        self.batches: tuple[BatchStore, BatchRunner] | None = None
        self.why_no_batches = "this server was started without a folder for them, or is mounted"
        self._started = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._names: dict[str, str | None] = {}

    # -- life ---------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests can be answered now."""
        return self._started and not self.draining and self.engine.fault is None

    async def start(self) -> None:
        """Start the engine, once.

        Raises:
            EngineError: the model cannot be loaded.
        """
        if self._started:
            return
        self.starting = True
        try:
            await self.engine.start()
            self._started = True
        finally:
            self.starting = False

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Start what runs beside the requests, and end it."""
        await self.start()
        await self._warm_up()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.history.running())
            folder = self.settings.batch_folder
            if folder is not None:
                await self._open_batches(folder, stack)
            yield

    async def _warm_up(self) -> None:
        """Have what renders chats ready before the first one, where the start did without it."""
        tokenizer = self.engine.tokenizer
        if tokenizer.chat_template is not None and not tokenizer.whole:
            with suppress(EngineError):  # the chat says so
                await asyncio.to_thread(lambda: tokenizer.hf)

    async def _open_batches(self, folder: Path, stack: AsyncExitStack) -> None:
        store = BatchStore(folder)
        if not await asyncio.to_thread(store.open):
            self.why_no_batches = f"another server keeps its batches in {folder}"
            return
        stack.callback(store.close)
        runner = BatchRunner(store, self._answer_batched, self.settings.batch_concurrency)
        await stack.enter_async_context(runner.running())
        self.batches = store, runner
        stack.callback(setattr, self, "batches", None)

    async def _answer_batched(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self.answer is not None, "the app knows how"
        return await self.answer(endpoint, body)

    async def drained(self, limit: float) -> bool:
        """Let no more requests in and wait until those inside are answered.

        Args:
            limit: seconds.

        Returns:
            False if some are left.
        """
        self.draining = True
        try:
            async with asyncio.timeout(limit):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Count a generating request as long as it takes.

        Raises:
            Failure: there are too many.
        """
        limit = self.request_limit
        if limit is not None and self._inside >= limit:
            raise Failure(
                503, f"The request queue is full: {limit} requests are here; try again later."
            )
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @property
    def request_limit(self) -> int | None:
        """Generating requests that are let in at most; None before the engine is started."""
        if self.settings.max_requests is not None or not self._started:
            return self.settings.max_requests
        config = self.engine.config
        return config.max_running_requests + config.max_queued_requests

    # -- requests -----------------------------------------------------------------------------

    def deadline(self, asked: float | None) -> float | None:
        """When a request that begins now must have ended, in the event loop's time."""
        limits = [each for each in (asked, self.settings.request_timeout) if each is not None]
        return asyncio.get_running_loop().time() + min(limits) if limits else None

    async def off_loop(self, characters: int, work: Callable[[], T]) -> T:
        """Do work on a text here or, where the text is long, in a thread."""
        return work() if characters <= _INLINE_CHARACTERS else await asyncio.to_thread(work)

    def check_images(self, count: int, field: str) -> None:
        """Refuse images before they are read.

        Args:
            count: of one prompt.
            field: of the body, that they came in.

        Raises:
            Failure: the model reads none, or not so many.
        """
        try:
            if count:
                self.engine.check_images(count)
        except InvalidRequest as error:
            raise Failure(400, f"{field}: {error.problem}", field) from error

    async def prompt(
        self, ids: Sequence[int], images: Sequence[str], field: str, deadline: float | None
    ) -> Prompt:
        """A prompt with the images that a client names.

        Args:
            ids: token ids, with the image token where an image stands.
            images: data URLs, base64, paths or URLs, in their order.
            field: of the body, that they came in.
            deadline: in the event loop's time.

        Raises:
            Failure: they may not be read, are none, or do not go together with the tokens.
            EngineError: the prompt is too long, or the engine has no room for it.
            TimeoutError: the deadline passed.
        """
        if not images:
            return Prompt(tuple(ids))
        self.check_images(len(images), field)
        try:
            async with asyncio.timeout_at(deadline):
                files = [await self.media.read(source) for source in images]
                return await self.engine.prompt(ids, files)
        except PromptTooLong:
            raise
        except InvalidRequest as error:
            raise Failure(400, f"{field}: {error.problem}", field) from error

    def text_of(self, token: int) -> str:
        """The text of one token."""
        return self.engine.tokenizer.decode([token], skip_special_tokens=False)

    async def complete(
        self, requests: Sequence[Request], deadline: float | None, group: str | None = None
    ) -> list[Completion]:
        """Run requests to their ends; see `calls.complete`.

        Args:
            requests: at least one.
            deadline: in the event loop's time.
            group: a name for all of them, for `abort`.
        """
        with self._named(requests, group):
            done = await complete(self.engine, requests, deadline)
        for each in done:
            self.metrics.finished(each.finish, streaming=False)
        return done

    async def stream(
        self, requests: Sequence[Request], deadline: float | None, group: str | None = None
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Run requests and give what they bring; see `calls.stream` and `complete`."""
        last: dict[int, float] = {}
        with self._named(requests, group):
            async with aclosing(stream(self.engine, requests, deadline)) as parcels:
                async for deltas in parcels:
                    now = time.monotonic()
                    for index, delta in deltas:
                        if index in last and delta.token_ids:
                            self.metrics.gap(now - last[index], len(delta.token_ids))
                        last[index] = now
                        if delta.finish is not None:
                            self.metrics.finished(delta.finish, streaming=True)
                    yield deltas

    def abort(self, name: str, *, prefix: bool = False, everything: bool = False) -> int:
        """End running requests by what their clients call them.

        Args:
            name: the whole id, or the id of a list or of several samples.
            prefix: all whose ids begin with `name`.
            everything: all.

        Returns:
            How many.
        """
        found = [
            each
            for each, group in self._names.items()
            if everything
            or (name and (name in (each, group) or (prefix and each.startswith(name))))
        ]
        for each in found:
            self.engine.abort(each)
        return len(found)

    @contextmanager
    def _named(self, requests: Sequence[Request], group: str | None) -> Iterator[None]:
        """Know the requests by their ids and by their common name."""
        mine = {each.request_id: group for each in requests}
        for name in mine:
            if name in self._names:
                raise Failure(400, f"rid: {name!r} is in use by a running request", "rid")
        self._names |= mine
        try:
            yield
        finally:
            for name in mine:
                del self._names[name]

    async def flush_cache(self, patience: float) -> bool:
        """Empty the prefix cache; False if requests run and do not end in time.

        Args:
            patience: seconds to wait for them.
        """
        if not patience:
            return await self.engine.flush_cache()
        try:
            async with asyncio.timeout(patience):
                return await self.engine.flush_cache(wait=True)
        except TimeoutError:
            return False

    # -- what happened --------------------------------------------------------------------------

    def note(self, failure: Failure, route: str) -> None:
        """Remember an error that a client got."""
        self.metrics.refused(failure.status)
        self.incidents.append(Incident(time.time(), route, failure.status, failure.message))

    def failed(self, error: Exception, route: str) -> None:
        """Remember what a stream ended with."""
        self.note(failure_of(error), route)

    def throughput(self) -> float:
        """Tokens drawn a second, in the last second; over all work where nobody keeps watch."""
        if self.history.moments:
            return self.history.moments[-1].tokens_per_second
        found = self.statistics()
        return found.tokens_per_second if found is not None else 0.0

    def statistics(self) -> Statistics | None:
        """The engine's counters; None before it is started."""
        found = self._snapshot()
        return None if found is None else found[0]

    def _snapshot(self) -> tuple[Statistics, ResolvedConfig] | None:
        try:
            return self.engine.statistics(), self.engine.config
        except EngineError:
            return None
