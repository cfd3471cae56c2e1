"""The engine as asyncio sees it: requests in, answers out, one wake a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from .config import EngineConfig, ProfileOptions, ResolvedConfig
from .delivery import Ticket
from .engine_thread import EngineThread
from .errors import EngineError, InvalidRequest
from .images import Prompt
from .reception import Reception
from .request import Completion, Delta, Request, Sampling, TokenLogprob
from .statistics import Statistics

if TYPE_CHECKING:
    from pathlib import Path

    from .hub import Progress
    from .loading import Loaded
    from .multimodal import ImageReader
    from .tokenizer import Tokenizer

__all__ = ["AsyncEngine"]

T = TypeVar("T")


class AsyncEngine:
    """A model in this process, for any number of requests at once.

    May be used from several event loops, one after another or at the same time.

    Args:
        config: settings; nothing is loaded before `start`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._asked = config
        self._reception = Reception()
        self._thread = EngineThread(config, self._reception)
        self._scores = count()

    def __repr__(self) -> str:
        loaded = self._thread.loaded is not None
        state = "closed" if self._reception.closed else "running" if loaded else "not started"
        return f"<AsyncEngine {self._asked.model_path!r}, {state}>"

    # -- life ---------------------------------------------------------------------------------

    async def start(self, progress: Progress | None = None) -> None:
        """Load the model, off the event loop; returns at once if it is loaded.

        Callers at the same time wait for the same start. Cancelling one leaves it running.

        Args:
            progress: called on the engine's thread with a stage and the share of it that is
                done (None: unknown).

        Raises:
            ModelError: the model cannot be found or loaded; start may be tried again.
            ConfigError: the settings do not fit the model or the machine.
            Closed: the engine was shut down.
        """
        await asyncio.shield(asyncio.wrap_future(self._thread.start(progress)))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """`shutdown` without blocking the event loop."""
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """Stop after the step in progress and wait for that; running requests get `Closed`.

        May be called from any thread, and again.
        """
        self._thread.shutdown()

    # -- requests -----------------------------------------------------------------------------

    async def prompt(self, given: str | Sequence[int], images: Sequence[bytes]) -> Prompt:
        """A prompt of text and images, for a `Request`; see `ImageReader.prompt`.

        Args:
            given: text or token ids; each image stands where the model's image token is.
            images: PNG, JPEG, WebP or GIF files, in their order; at least one.

        Raises:
            InvalidRequest: the model reads no images, they do not go together with the image
                tokens, or one cannot be read.
            PromptTooLong: its tokens and those of its images are too many.
            Overloaded: too many prompts wait for their images, or too much memory is taken.
            Closed: the engine was shut down.
        """
        return await self._image_reader(len(images)).prompt(given, images)

    def check_images(self, count: int) -> None:
        """Refuse images before they are read.

        Args:
            count: of one prompt.

        Raises:
            InvalidRequest: the model reads none, or not so many.
        """
        self._image_reader(count)

    def _image_reader(self, count: int) -> ImageReader:
        loaded = self._ready()
        most = loaded.config.max_images
        if isinstance(loaded.images, str):
            raise InvalidRequest("images", loaded.images)
        if count > most:
            problem = f"a prompt has {count} images, at most {most} are read (max_images)"
            raise InvalidRequest("images", problem)
        return loaded.images

    async def generate(self, request: Request) -> Completion:
        """Run one request to its end. Cancelling this aborts it within one step.

        Raises:
            InvalidRequest: it can never run here.
            Overloaded: the queue is full.
            StepFailed: the forward pass it was in failed.
            RankFailed: a tensor-parallel rank failed, and the engine with it.
            Closed: the engine is shut down.
        """
        ticket = self._submit(request)
        try:
            return await ticket.completion()
        finally:
            self._reception.leave(ticket)

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Run one request and give what each step adds; leaving early aborts it.

        Set `Request.stream`, or everything comes at once at the end.

        Raises:
            EngineError: as `generate`.
        """
        ticket = self._submit(request)
        try:
            while not ticket.done:
                for delta in await ticket.take():
                    yield delta
        finally:
            self._reception.leave(ticket)

    async def score(
        self, prefix_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[TokenLogprob, ...]]:
        """Log-probabilities of continuations' tokens after a prefix that is computed once.

        Args:
            prefix_ids: at least one token.
            continuations: token ids, at least one each.

        Returns:
            For each continuation one entry a token.

        Raises:
            EngineError: as `generate`.
        """
        number = next(self._scores)
        requests = [
            Request(
                request_id=f"score-{number}-{index}",
                prompt_ids=(*prefix_ids, *tokens),
                sampling=Sampling(max_new_tokens=0),
                return_logprob=True,
                logprob_start_len=len(prefix_ids),
            )
            for index, tokens in enumerate(continuations)
        ]
        tickets = [self._submit(request) for request in requests]
        try:
            return [(await ticket.completion()).prompt_logprobs for ticket in tickets]
        finally:
            for ticket in tickets:
                self._reception.leave(ticket)

    def abort(self, request_id: str) -> None:
        """End a request within one step; whoever waits for it gets finish reason `abort`.

        An unknown id is ignored: the request may have ended just now. Any thread may call this.
        """
        self._reception.abort(request_id)

    async def flush_cache(self, wait: bool = False) -> bool:
        """Empty the prefix cache.

        Args:
            wait: wait until no request runs, however long that takes. Requests that come in
                meanwhile wait behind this, so that those before it are all it waits for; cancel
                the call to let them go on.

        Returns:
            False, and nothing done, when requests run and `wait` is not set.
        """
        return await self._call(lambda loaded: loaded.core.clear_cache(), when_idle=wait)

    async def check(self) -> None:
        """Prove that the books agree with one another.

        Raises:
            InternalError: they do not.
        """
        await self._call(lambda loaded: loaded.core.check())

    def statistics(self) -> Statistics:
        """Counters and gauges as of the last step; any thread may ask.

        Raises:
            EngineError: the engine was not started.
        """
        statistics = self._thread.statistics
        if statistics is None:
            raise EngineError("the engine is not started: await engine.start() first")
        return statistics

    async def start_profile(self, options: ProfileOptions | None = None) -> None:
        """Record what this process computes from now on, on all its threads.

        Args:
            options: what to record.

        Raises:
            InvalidRequest: a recording is under way.
        """
        asked = options or ProfileOptions()
        await self._call(lambda loaded: loaded.profiler.start(asked))

    async def stop_profile(self, path: Path) -> None:
        """End the recording and write it as a trace that Chrome and Perfetto show.

        Args:
            path: of the file, which may end in `.gz`.

        Raises:
            InvalidRequest: nothing is being recorded.
        """
        await self._call(lambda loaded: loaded.profiler.stop(path))

    @property
    def asked(self) -> EngineConfig:
        """The settings as asked for."""
        return self._asked

    @property
    def reads_images(self) -> bool:
        """Whether prompts may have images, once started."""
        return not isinstance(self._ready().images, str)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, once started."""
        return self._ready().tokenizer

    @property
    def config(self) -> ResolvedConfig:
        """The settings as decided, once started."""
        return self._ready().config

    @property
    def fault(self) -> EngineError | None:
        """Why the engine ended by itself, if it did; every call raises it from then on."""
        return self._reception.fault

    def _ready(self) -> Loaded:
        loaded = self._thread.loaded
        if loaded is None:
            self._reception.refuse_if_closed()
            raise EngineError("the engine is not started: await engine.start() first")
        return loaded

    def _submit(self, request: Request) -> Ticket:
        limit = self._ready().config.max_queued_requests
        return self._reception.submit(request, self.statistics().waiting, limit)

    async def _call(self, work: Callable[[Loaded], T], when_idle: bool = False) -> T:
        """Run a function on the engine's thread, between steps."""
        done = self._thread.ask(self._ready(), work, when_idle)
        try:
            return await asyncio.wrap_future(done)
        finally:
            self._reception.wake()  # for those who waited behind this
