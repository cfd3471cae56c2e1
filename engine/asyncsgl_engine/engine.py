"""The engine as asyncio sees it: one thread that steps, an inbox, one wake a step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from .config import EngineConfig, ProfileOptions, ResolvedConfig
from .delivery import Ticket, deliver
from .errors import Closed, EngineError, InternalError, InvalidRequest, Overloaded, RankFailed
from .images import Prompt
from .inbox import Inbox, Patient
from .request import Completion, Delta, Finish, Request, Sampling, TokenLogprob
from .statistics import Statistics

if TYPE_CHECKING:
    from pathlib import Path

    from .core import EngineCore
    from .loading import Loaded, Progress
    from .multimodal import ImageReader
    from .profiling import Profile
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
        self._lock = threading.Condition()
        self._inbox = Inbox()
        self._tickets: dict[str, Ticket] = {}
        self._when_idle: list[Patient] = []
        self._started: Future[None] | None = None
        self._thread: threading.Thread | None = None
        self._loaded: Loaded | None = None
        self._statistics: Statistics | None = None
        self._closing = False
        self._fault: EngineError | None = None
        self._scores = count()
        self._profile: Profile | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closing else "running" if self._loaded else "not started"
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
        with self._lock:
            self._refuse_if_closed()
            started = self._started
            if started is None:
                started = self._started = Future()
                self._thread = threading.Thread(
                    target=self._main, args=(started, progress), name="asyncsgl-engine", daemon=True
                )
                self._thread.start()
        await asyncio.shield(asyncio.wrap_future(started))

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
        with self._lock:
            self._closing = True
            self._lock.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

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
            self._leave(ticket)

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
            self._leave(ticket)

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
                self._leave(ticket)

    def abort(self, request_id: str) -> None:
        """End a request within one step; whoever waits for it gets finish reason `abort`.

        An unknown id is ignored: the request may have ended just now. Any thread may call this.
        """
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is None:
                return
            if self._inbox.new.pop(request_id, None) is None:
                self._inbox.aborted.add(request_id)
                self._lock.notify()
                return
            del self._tickets[request_id]
        deliver([(ticket, _never_begun(ticket.request))])

    async def flush_cache(self, wait: bool = False) -> bool:
        """Empty the prefix cache.

        Args:
            wait: wait until no request runs, however long that takes. Requests that come in
                meanwhile wait behind this, so that those before it are all it waits for; cancel
                the call to let them go on.

        Returns:
            False, and nothing done, when requests run and `wait` is not set.
        """

        def flush(loaded: Loaded) -> bool:
            return loaded.core.clear_cache()

        return await self._call(flush, when_idle=wait)

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
        if self._statistics is None:
            raise EngineError("the engine is not started: await engine.start() first")
        return self._statistics

    async def start_profile(self, options: ProfileOptions | None = None) -> None:
        """Record what the engine's thread does from now on.

        Args:
            options: what to record.

        Raises:
            InvalidRequest: a recording is under way.
        """

        def start(_: Loaded) -> None:
            if self._profile is not None:
                raise InvalidRequest("profile", "one is being recorded; stop it first")
            from .profiling import Profile

            self._profile = Profile(options or ProfileOptions())

        await self._call(start)

    async def stop_profile(self, path: Path) -> None:
        """End the recording and write it as a trace that Chrome and Perfetto show.

        Args:
            path: of the file, which may end in `.gz`.

        Raises:
            InvalidRequest: nothing is being recorded.
        """

        def stop(_: Loaded) -> None:
            if self._profile is None:
                raise InvalidRequest("profile", "none is being recorded; start one first")
            profile, self._profile = self._profile, None
            profile.stop(path)

        await self._call(stop)

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
        return self._fault

    def _ready(self) -> Loaded:
        loaded = self._loaded
        if loaded is None:
            self._refuse_if_closed()
            raise EngineError("the engine is not started: await engine.start() first")
        return loaded

    def _refuse_if_closed(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._closing:
            raise Closed("the engine is shut down; make a new one")

    def _submit(self, request: Request) -> Ticket:
        limit = self._ready().config.max_queued_requests
        ticket = Ticket(request, asyncio.get_running_loop())
        name = request.request_id
        with self._lock:
            self._refuse_if_closed()
            if name in self._tickets:
                raise InvalidRequest("request_id", f"{name!r} is in use by a running request")
            waiting = self.statistics().waiting + len(self._inbox.new)
            if waiting >= limit:
                raise Overloaded(waiting, limit)
            self._tickets[name] = ticket
            self._inbox.new[name] = request
            self._lock.notify()
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        """Nobody waits for this ticket any more."""
        name = ticket.request.request_id
        with self._lock:
            if self._tickets.get(name) is not ticket:
                return
            del self._tickets[name]
            self._inbox.aborted.discard(name)
            if self._inbox.new.pop(name, None) is None:
                self._inbox.left.add(name)
                self._lock.notify()

    async def _call(self, work: Callable[[Loaded], T], when_idle: bool = False) -> T:
        """Run a function on the engine's thread, between steps."""
        loaded = self._ready()
        done: Future[T] = Future()

        def call() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = work(loaded)
                self._statistics = loaded.core.statistics()
                done.set_result(result)
            except Exception as error:  # noqa: BLE001 - handed to the caller
                done.set_exception(error)

        with self._lock:
            self._refuse_if_closed()
            if when_idle:
                self._when_idle.append(Patient(done, call))
            else:
                self._inbox.calls.append(call)
            self._lock.notify()
        try:
            return await asyncio.wrap_future(done)
        finally:
            self._wake()  # for those who waited behind this

    # -- the engine's thread ------------------------------------------------------------------

    def _main(self, started: Future[None], progress: Progress | None) -> None:
        try:
            # Imported here: it brings torch and transformers, which takes seconds.
            from .loading import load

            loaded = load(self._asked, progress or _ignore, self._lose_rank)
            loaded.constraints.when_compiled(self._wake)
            self._statistics = loaded.core.statistics()
        except Exception as error:  # noqa: BLE001 - handed to the callers of start
            with self._lock:
                self._started = None
            started.set_exception(error)
            return
        self._loaded = loaded
        started.set_result(None)
        try:
            while self._turn(loaded):
                pass
        except RankFailed as error:
            self._fault = error
        except Exception as error:  # noqa: BLE001 - handed to all requests
            fault = InternalError(f"the engine's thread failed: {error!r}")
            fault.__cause__ = error
            self._fault = fault
        self._end(loaded)

    @property
    def _ends(self) -> bool:
        return self._closing or self._fault is not None

    def _lose_rank(self, fault: RankFailed) -> None:
        """A tensor-parallel rank ended, perhaps while nothing was to be done."""
        with self._lock:
            self._fault = fault
            self._lock.notify()

    def _turn(self, loaded: Loaded) -> bool:
        """Wait for work and do one step of it; False when it is time to end."""
        core = loaded.core
        with self._lock:
            while not (self._told(core) or core.can_step or self._ends or self._may_call(core)):
                self._lock.wait()
            if self._ends:
                return False
            inbox, self._inbox = self._inbox, Inbox()
            if self._holds(core):
                self._inbox.hold_new(inbox)
        deltas = core.step(inbox.new.values(), inbox.left | inbox.aborted)
        self._statistics = core.statistics()
        for call in inbox.calls:
            call()
        if not core.busy:
            calls, self._when_idle = self._when_idle, []
            for each in calls:
                each.call()
        self._route([delta for delta in deltas if not _is_farewell(delta, inbox.left)])
        return True

    def _holds(self, core: EngineCore) -> bool:
        """Whether new requests wait behind somebody who waits for idleness."""
        self._when_idle = [each for each in self._when_idle if not each.done.cancelled()]
        return bool(self._when_idle) and core.busy

    def _told(self, core: EngineCore) -> bool:
        """Whether something came in that can be acted on."""
        inbox = self._inbox
        if inbox.left or inbox.calls or inbox.aborted - inbox.new.keys():
            return True
        return bool(inbox.new) and not self._holds(core)

    def _may_call(self, core: EngineCore) -> bool:
        """Whether somebody waits for idleness, and it has come."""
        return bool(self._when_idle) and not core.busy

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    def _route(self, deltas: Sequence[Delta]) -> None:
        parcels: list[tuple[Ticket, Delta]] = []
        with self._lock:
            for delta in deltas:
                ended = delta.finish is not None or delta.error is not None
                name = delta.request_id
                ticket = self._tickets.pop(name, None) if ended else self._tickets.get(name)
                if ticket is not None:
                    parcels.append((ticket, delta))
        for ticket in deliver(parcels):
            self._leave(ticket)

    def _end(self, loaded: Loaded) -> None:
        """End what is left, so that nobody waits for ever."""
        with self._lock:
            self._closing = True
            left, self._tickets = list(self._tickets.values()), {}
            calls = [*self._inbox.calls, *(each.call for each in self._when_idle)]
        for call in calls:
            call()
        deliver(
            (ticket, Delta(ticket.request.request_id, error=self._farewell())) for ticket in left
        )
        loaded.core.fail_all(self._farewell())
        self._statistics = loaded.core.statistics()
        loaded.resources.close()
        if self._profile is not None:
            self._profile.drop()
        self._loaded = None

    def _farewell(self) -> EngineError:
        return self._fault or Closed("the engine was shut down while this request was in it")


def _is_farewell(delta: Delta, left: set[str]) -> bool:
    """Whether this is the abort of a request whose caller is gone; its id may be in use again."""
    finish = delta.finish
    return finish is not None and finish.reason == "abort" and delta.request_id in left


def _never_begun(request: Request) -> Delta:
    """The end of a request that was aborted before the engine's thread saw it."""
    finish = Finish("abort", None, len(request.prompt_ids), 0, 0, 0.0, 0.0, 0.0)
    return Delta(request.request_id, finish=finish)


def _ignore(stage: str, fraction: float | None) -> None:
    """The progress nobody asked for."""
