"""Backends without a model, to test programs with."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType

from .backends.base import FEATURES, Backend, Capabilities
from .backends.passing import PassingBackend
from .errors import ClosedError, InvalidArgument
from .lang.chat_template import ChatTemplate
from .types import (
    ChoiceScore,
    Completion,
    Delta,
    Generation,
    GenRequest,
    Scores,
    Timings,
    Usage,
)

__all__ = ["Answer", "Answers", "RecordingBackend", "ScriptedBackend", "last_text"]

Answer = str | Completion | Exception
"""A text, a whole completion, or an exception to raise."""

Answers = (
    Answer
    | Sequence[Answer | Sequence[Answer]]
    | Mapping[str, Answer]
    | Callable[[GenRequest], Answer | Sequence[Answer] | Awaitable[Answer | Sequence[Answer]]]
)


def last_text(request: GenRequest) -> str:
    """What was said last: the text of the last message that has some.

    Args:
        request: a recorded request.
    """
    return next((m.text for m in reversed(request.messages) if m.text), "")


class ScriptedBackend(Backend):
    """Answers by a script, and records what it was asked.

    Args:
        answers: one answer for every call; a list, one answer for each call in order, or a
            list of ``n`` where the call asks for several; a table from a part of the last
            text to the answer; or a function of the request, plain or ``async``, that gives
            an answer, or a list of ``n`` of them. An exception as an answer is raised.
            Texts are cut at the request's stop strings and, by words, at its max_tokens.
        delay: seconds before each answer.
        chunk_size: characters a piece when streaming; None for the whole text at once.
        chunk_delay: seconds before each piece.
        scores: for ``select``: from a choice to the mean logprob of its tokens; others get
            -10. Without it the first choice wins.
        capabilities: what the backend claims to be able to do; everything unless given.
        name: what it is called.
        chat_template: the template it says it uses.

    Attributes:
        requests: what it was asked, in order.
        running: requests that it works on now.
        cancelled: requests that were given up before their end.
    """

    def __init__(
        self,
        answers: Answers = "",
        *,
        delay: float = 0.0,
        chunk_size: int | None = None,
        chunk_delay: float = 0.0,
        scores: Mapping[str, float] | None = None,
        capabilities: Capabilities | None = None,
        name: str = "scripted",
        chat_template: ChatTemplate | None = None,
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise InvalidArgument("chunk_size", f"must be at least 1, got {chunk_size}")
        self.name = name
        self.chat_template = chat_template
        self.requests: list[GenRequest] = []
        self.running = 0
        self.cancelled = 0
        self._answers = answers
        self._in_order = itertools.count()
        self._delay = delay
        self._chunk_size = chunk_size
        self._chunk_delay = chunk_delay
        self._scores = scores
        self._capabilities = capabilities or Capabilities(native=frozenset(FEATURES))
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """What the backend claims to be able to do."""
        return self._capabilities

    async def generate(self, request: GenRequest) -> Generation:
        """Give the next answer of the script; see :meth:`Backend.generate`."""
        with self._at_work(request):
            if self._delay:
                await asyncio.sleep(self._delay)
            return await self._generation(request)

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Give the next answer in pieces; see :meth:`Backend.stream`."""
        with self._at_work(request):
            if self._delay:
                await asyncio.sleep(self._delay)
            generation = await self._generation(request)
            for delta in self._pieces(generation):
                await asyncio.sleep(self._chunk_delay)
                yield delta
        yield Delta(generation=generation)

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score by the table; see :meth:`Backend.score`."""
        with self._at_work(request):
            await asyncio.sleep(self._delay)
        table = self._scores if self._scores is not None else {choices[0]: -1.0}
        return Scores(
            tuple(
                ChoiceScore(
                    choice,
                    (index,),
                    (table.get(choice, -10.0),),
                    (0.0,) if unconditional else None,
                )
                for index, choice in enumerate(choices)
            ),
            usage=Usage(prompt_tokens=_words(request), requests=1),
        )

    async def cache_prefix(self, request: GenRequest) -> None:
        """Record the request."""
        self._record(request)

    def statistics(self) -> Mapping[str, float]:
        """``requests`` so far, ``running`` now, ``cancelled`` before their end."""
        return {
            "requests": len(self.requests),
            "running": self.running,
            "cancelled": self.cancelled,
        }

    async def aclose(self) -> None:
        """Refuse further requests."""
        self._closed = True

    def _record(self, request: GenRequest) -> None:
        if self._closed:
            raise ClosedError(f"the backend {self.name!r} is closed")
        self.requests.append(request)

    def _at_work(self, request: GenRequest) -> _AtWork:
        self._record(request)
        return _AtWork(self)

    def _pieces(self, generation: Generation) -> Iterator[Delta]:
        """Of each answer the reasoning, then the text; logprobs come with its first piece."""
        for index, completion in enumerate(generation.completions):
            for piece in self._cut(completion.reasoning or ""):
                yield Delta(index=index, reasoning=piece)
            logprobs = completion.logprobs or ()
            for piece in self._cut(completion.text):
                yield Delta(piece, index, logprobs=logprobs)
                logprobs = ()

    def _cut(self, text: str) -> Iterator[str]:
        size = self._chunk_size or max(len(text), 1)
        for start in range(0, len(text), size):
            yield text[start : start + size]

    async def _generation(self, request: GenRequest) -> Generation:
        answers = await self._answer(request)
        count = request.sampling.n or 1
        if isinstance(answers, (str, Completion, Exception)):
            given = [answers] * count
        else:
            given = list(answers)
        if len(given) != count:
            raise InvalidArgument("answers", f"{len(given)} answers for n={count}")
        completions = tuple(_completion(answer, request) for answer in given)
        usage = Usage(_words(request), sum(c.completion_tokens for c in completions), requests=1)
        return Generation(
            completions, usage, request.request_id, self.name, Timings(total=self._delay)
        )

    async def _answer(self, request: GenRequest) -> Answer | Sequence[Answer]:
        answers = self._answers
        if isinstance(answers, (str, Completion, Exception)):
            return answers
        if isinstance(answers, Mapping):
            return _by_table(answers, last_text(request))
        if callable(answers):
            made = answers(request)
            return await made if isinstance(made, Awaitable) else made
        number = next(self._in_order)
        if number >= len(answers):
            raise InvalidArgument("answers", f"the script has only {len(answers)} answers")
        return answers[number]


class _AtWork:
    """Counts a request of a scripted backend while it is worked on."""

    __slots__ = ("_backend",)

    def __init__(self, backend: ScriptedBackend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        self._backend.running += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._backend.running -= 1
        self._backend.cancelled += isinstance(exc, (asyncio.CancelledError, GeneratorExit))


def _by_table(table: Mapping[str, Answer], text: str) -> Answer:
    for part, answer in table.items():
        if part in text:
            return answer
    raise InvalidArgument("answers", f"no entry of the script fits {text!r}")


def _words(request: GenRequest) -> int:
    return sum(len(message.text.split()) for message in request.messages)


def _completion(answer: Answer, request: GenRequest) -> Completion:
    """The answer as the request would have it: cut at stop strings and at the length."""
    if isinstance(answer, Exception):
        raise answer
    if isinstance(answer, Completion):
        return answer
    text, matched = answer, None
    for stop in request.sampling.stop or ():
        before, found, _ = text.partition(stop)
        if found:
            text, matched = before, stop
    tokens = len(text.split())
    limit = request.sampling.max_tokens
    if limit is not None and tokens > limit:
        return Completion(" ".join(text.split()[:limit]), "length", completion_tokens=limit)
    return Completion(text, "stop", matched, completion_tokens=tokens)


class RecordingBackend(PassingBackend):
    """Passes everything on to another backend and keeps requests and results.

    Args:
        backend: the backend that does the work; closing this one closes it.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.calls: list[tuple[GenRequest, Generation | Scores | Exception]] = []

    async def generate(self, request: GenRequest) -> Generation:
        """Pass on and keep the result; see :meth:`Backend.generate`."""
        try:
            generation = await self.backend.generate(request)
        except Exception as error:
            self.calls.append((request, error))
            raise
        self.calls.append((request, generation))
        return generation

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Pass on and keep the result; see :meth:`Backend.stream`."""
        try:
            async with aclosing(self.backend.stream(request)) as deltas:
                async for delta in deltas:
                    if delta.generation is not None:
                        self.calls.append((request, delta.generation))
                    yield delta
        except Exception as error:
            self.calls.append((request, error))
            raise

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Pass on and keep the result; see :meth:`Backend.score`."""
        try:
            scores = await self.backend.score(request, choices, unconditional=unconditional)
        except Exception as error:
            self.calls.append((request, error))
            raise
        self.calls.append((request, scores))
        return scores

    def script(self) -> list[Answer | Sequence[Answer]]:
        """The recorded answers, for a :class:`ScriptedBackend` that gives them again.

        Scores are not among them: a scripted backend has a table for these.
        """
        return [
            list(result.completions) if isinstance(result, Generation) else result
            for _, result in self.calls
            if not isinstance(result, Scores)
        ]
