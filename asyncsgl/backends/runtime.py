"""The local engine as a backend."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .._optional import needs
from ..errors import (
    BackendTimeout,
    ClosedError,
    InvalidArgument,
    UnsupportedFeature,
)
from ..lang.chat_template import ChatTemplate, JinjaTemplate, get_chat_template
from ..sampling import SAMPLING_FIELDS
from ..types import (
    Completion,
    Delta,
    Generation,
    GenRequest,
    Scores,
)
from .base import Backend, Capabilities
from .joined_stream import joined, together
from .runtime_images import RuntimeImages, checked_settings, images_of
from .runtime_server import RuntimeServer

with needs("engine"):
    from asyncsgl_engine.config import EngineConfig
    from asyncsgl_engine.engine import AsyncEngine
    from asyncsgl_engine.errors import ConfigError, EngineError
    from asyncsgl_engine.images import Prompt
    from asyncsgl_engine.request import Finish

    from .engine_calls import (
        Assembly,
        completion_of,
        engine_requests,
        logprobs_of,
        prefill_request,
        scores_of,
        scoring_request,
        timings_of,
        translated,
        usage_of,
    )
    from .runtime_prompts import RuntimePrompts

if TYPE_CHECKING:
    from asyncsgl_engine.tokenizer import Tokenizer

__all__ = ["Runtime"]

Progress = Callable[[str, float | None], None]

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


class Runtime(Backend):
    """A model in this process: continuous batching over a paged KV cache.

    Making one checks its settings and returns at once. The model loads on ``async with``, on
    :meth:`start`, or at the first request, without blocking the event loop.

    Args:
        model_path: the default model's name, a Hugging Face id, a folder, or a ``.gguf`` file.
        tokenizer_path: another place for the tokenizer.
        host: the address to serve HTTP on, where it serves.
        port: the port to serve HTTP on, besides programs; 0 takes a free one, None serves none.
        tp_size: how many processes share the model's tensors, each on a GPU of its own or, on
            processors, with its share of the cores.
        log_level: of the server's log.
        launch_timeout: seconds that loading may take.
        progress: called with a stage and a fraction while the model loads.
        serve: serve HTTP, on a free port where ``port`` is left out.
        server_settings: of the server, by their names: ``api_key``, ``request_timeout`` …. Images
            that a program names by URL are fetched from its ``allow_media_domains`` only.
        **engine_config: settings of the engine, by SGLang's names: ``page_size``, ``dtype``,
            ``max_running_requests``, ``chunked_prefill_size``, ``context_length`` ….

    Raises:
        InvalidArgument: a setting is unknown or out of its range.
        UnsupportedFeature: the setting needs something that is not there.
    """

    name = "runtime"
    keeps_prefixes = True

    def __init__(
        self,
        model_path: str = "smollm2-135m-instruct",
        tokenizer_path: str | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        tp_size: int = 1,
        log_level: str = "error",
        launch_timeout: float = 300.0,
        progress: Progress | None = None,
        serve: bool = False,
        server_settings: Mapping[str, object] | None = None,
        **engine_config: Any,
    ) -> None:
        if launch_timeout <= 0:
            raise InvalidArgument("launch_timeout", f"must be above 0, got {launch_timeout!r}")
        self.model_path = model_path
        self.host = host
        self.log_level = log_level
        self.launch_timeout = launch_timeout
        self._progress = progress
        try:
            config = EngineConfig(
                model_path=model_path,
                tokenizer_path=tokenizer_path,
                tp_size=tp_size,
                **engine_config,
            )
        except ConfigError as error:
            raise InvalidArgument("engine_config", str(error)) from error
        except TypeError as error:
            raise InvalidArgument("engine_config", f"no such setting: {error}") from error
        self.engine = AsyncEngine(config)
        self.default_concurrency = config.max_running_requests or 128
        self._closed = False
        self._trace = Path(tempfile.gettempdir()) / "asyncsgl.trace.json"
        self._ready = False
        self._model_template: ChatTemplate | None = None
        settings = checked_settings(server_settings)
        self._prompts = RuntimePrompts(self.engine, RuntimeImages(settings, self.name))
        self._server = (
            RuntimeServer(self.engine, host, port or 0, log_level, settings)
            if serve or port is not None
            else None
        )
        self._close = weakref.finalize(self, _end, self.engine, self._server)

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do; whether images, the model decides once it is loaded."""
        if not self._ready or self.engine.reads_images:
            return _CAPABILITIES
        hint = f"the model {self.model_path!r} reads text only"
        hints = dict.fromkeys(("image", "video"), hint)
        return replace(_CAPABILITIES, native=_CAPABILITIES.native - {"image"}, hints=hints)

    @property
    def endpoint(self) -> Runtime:
        """The backend itself, as in ``runtime.endpoint.chat_template = …``."""
        return self

    @property
    def url(self) -> str | None:
        """The HTTP address, where this serves; None where it does not."""
        return None if self._server is None else self._server.url

    # -- life ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model; returns at once if it is loaded.

        Raises:
            BackendTimeout: it took longer than ``launch_timeout``.
            BackendError: the model cannot be found, fetched or loaded.
            InvalidArgument: the port is in use.
            ClosedError: the runtime was closed.
        """
        if self._ready:
            return
        if self._closed:
            raise ClosedError("this Runtime is closed: make a new one")
        try:
            with self._translating(), needs("engine"):
                await asyncio.wait_for(self.engine.start(self._progress), self.launch_timeout)
        except TimeoutError as error:
            raise BackendTimeout(
                f"the model {self.model_path!r} was not ready in {self.launch_timeout:g} seconds; "
                "raise launch_timeout",
                backend=self.name,
            ) from error
        if self._server is not None:
            await self._server.start()
        self._model_template = _template_of(self.engine.tokenizer)
        self._ready = True

    def shutdown(self) -> None:
        """Stop the engine and wait for its end; running requests are cancelled. Repeatable."""
        self._closed = True
        self._ready = False
        self._close()

    async def aclose(self) -> None:
        """:meth:`shutdown` without blocking the event loop."""
        if self._closed:
            return
        self._closed = True
        self._ready = False
        self._close.detach()
        await asyncio.to_thread(_end, self.engine, self._server)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    # -- requests -------------------------------------------------------------------------

    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request; see :meth:`Backend.generate`."""
        await self.start()
        with self._translating(request.request_id):
            calls = engine_requests(request, await self._prompt(request), stream=False)
            done = await together([self.engine.generate(call) for call in calls])
        completions = [completion_of(request, answer, self._token_text) for answer in done]
        return self._generation(request, completions, [answer.finish for answer in done])

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; see :meth:`Backend.stream`."""
        await self.start()
        with self._translating(request.request_id):
            calls = engine_requests(request, await self._prompt(request), stream=True)
            answers = [Assembly(call.request_id) for call in calls]
            shown = self._token_text if request.sampling.return_text_in_logprobs else None
            async with aclosing(joined([self.engine.stream(call) for call in calls])) as deltas:
                async for index, delta in deltas:
                    answers[index].add(delta)
                    if delta.text or delta.logprobs:
                        yield Delta(delta.text, index, logprobs=logprobs_of(delta.logprobs, shown))
            done = [answer.completion() for answer in answers]
        completions = [completion_of(request, answer, self._token_text) for answer in done]
        finishes = [answer.finish for answer in done]
        yield Delta(generation=self._generation(request, completions, finishes))

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score all choices in one batch; see :meth:`Backend.score`."""
        await self.start()
        name = request.request_id
        with self._translating(name):
            prefix = await self._prompt(request)
            prompts = self._prompts
            given = [await prompts.continued(request, prefix.ids, choice) for choice in choices]
            tokens = [continued.ids for continued in given]
            alone = [prompts.unprompted(ids) for ids in tokens] if unconditional else []
            calls = [
                scoring_request(f"{name}-{index}", continued.prompt, continued.start)
                for index, continued in enumerate([*given, *alone])
            ]
            done = await together([self.engine.generate(call) for call in calls])
        return scores_of(choices, tokens, done)

    async def cache_prefix(self, request: GenRequest) -> None:
        """Compute the request's prompt and leave it in the prefix cache."""
        await self.start()
        with self._translating(request.request_id):
            prompt = await self._prompt(request)
            await self.engine.generate(prefill_request(request.request_id, prompt))

    async def _prompt(self, request: GenRequest) -> Prompt:
        if images_of(request):
            self.check(request)  # it may have been asked before the model was loaded
        return await self._prompts.prompt(request)

    def _token_text(self, token: int) -> str:
        return self.engine.tokenizer.decode([token], skip_special_tokens=False)

    def _generation(
        self, request: GenRequest, completions: Sequence[Completion], finishes: Sequence[Finish]
    ) -> Generation:
        return Generation(
            tuple(completions),
            usage_of(finishes),
            request.request_id,
            self.model_path,
            timings_of(finishes),
        )

    @contextmanager
    def _translating(self, request_id: str | None = None) -> Iterator[None]:
        """Raise the engine's errors as the frontend's."""
        try:
            yield
        except EngineError as error:
            raise translated(error, self.name, request_id) from error

    # -- the rest ---------------------------------------------------------------------------

    async def chat_template_in_use(self) -> ChatTemplate:
        """The template that was set, or else the model's own; loads the model for it."""
        if self.chat_template is not None:
            return self.chat_template
        await self.start()
        return self._model_template or get_chat_template("default")

    def get_tokenizer(self) -> Any:
        """The tokenizer of transformers that the model uses.

        A start that does without transformers leaves it to the first call, which then reads files
        for a second: call it in a thread where an event loop runs.

        Raises:
            ClosedError: the model is not loaded.
            BackendError: the tokenizer's files are not there any more.
        """
        if not self._ready:
            raise ClosedError("the model is not loaded: await runtime.start() first")
        with self._translating():
            return self.engine.tokenizer.hf

    def statistics(self) -> Mapping[str, float]:
        """The engine's counters: pages free, held and cached, requests waiting and running …."""
        if not self._ready:
            return {}
        values = asdict(self.engine.statistics())
        return {name: value for name, value in values.items() if isinstance(value, (int, float))}

    async def get_server_info(self) -> dict[str, object]:
        """The engine's settings as decided, and its counters."""
        await self.start()
        config = asdict(self.engine.config)
        return {"model_path": self.model_path, **config, "internal_states": [self.statistics()]}

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        """Begin to record what the engine computes; see :meth:`Backend.start_profile`.

        Args:
            output_dir: the folder for the trace; the system's one for temporary files unless
                given.
            num_steps: not supported: call :meth:`stop_profile`.

        Returns:
            the path that the trace will have.

        Raises:
            BadRequestError: a profile is being recorded already.
        """
        if num_steps is not None:
            raise UnsupportedFeature(self.name, "num_steps", "call stop_profile")
        await self.start()
        with self._translating():
            await self.engine.start_profile()
        folder = Path(output_dir or tempfile.gettempdir())
        self._trace = folder / f"asyncsgl-{os.getpid()}-{time.time_ns()}.trace.json"
        return str(self._trace)

    async def stop_profile(self) -> str:
        """Write what was recorded as a Chrome trace.

        Returns:
            the trace's path.

        Raises:
            BadRequestError: nothing is being recorded.
        """
        await self.start()
        path = self._trace
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        with self._translating():
            await self.engine.stop_profile(path)
        return str(path)

    async def flush_cache(self, *, wait: bool = False) -> bool:
        """Empty the prefix cache; False, and nothing done, while requests run.

        Args:
            wait: wait until no request runs, then empty it.
        """
        await self.start()
        return await self.engine.flush_cache(wait=wait)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "ready" if self._ready else "not loaded"
        return f"<Runtime {self.model_path!r}, {state}>"


def _end(engine: AsyncEngine, server: RuntimeServer | None) -> None:
    """End the engine, which ends what runs, and then the server that tells so."""
    engine.shutdown()
    if server is not None:
        server.stop()


def _template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    source = tokenizer.chat_template
    return JinjaTemplate(source, dict(tokenizer.special_tokens)) if source else None
