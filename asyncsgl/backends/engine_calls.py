"""Requests of programs as requests of the local engine, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from asyncsgl_engine import errors as engine_errors
from asyncsgl_engine.images import Prompt
from asyncsgl_engine.request import Completion as EngineCompletion
from asyncsgl_engine.request import Delta as EngineDelta
from asyncsgl_engine.request import Finish, Grammar, Sampling
from asyncsgl_engine.request import Request as EngineRequest
from asyncsgl_engine.request import TokenLogprob as EngineLogprob

from ..errors import (
    AsyncSGLError,
    BackendError,
    BadRequestError,
    ClosedError,
    ContextLengthError,
    InternalError,
    OverloadedError,
    TruncatedStreamError,
)
from ..types import ChoiceScore, Completion, GenRequest, Scores, Timings, TokenLogprob, Usage

__all__ = [
    "Assembly",
    "completion_of",
    "engine_requests",
    "logprobs_of",
    "prefill_request",
    "scores_of",
    "scoring_request",
    "timings_of",
    "translated",
    "usage_of",
]

T = TypeVar("T")
TextOf = Callable[[int], str]

_MESSAGES: tuple[tuple[type[engine_errors.EngineError], type[BackendError]], ...] = (
    (engine_errors.PromptTooLong, ContextLengthError),
    (engine_errors.InvalidRequest, BadRequestError),
    (engine_errors.Overloaded, OverloadedError),
    (engine_errors.EngineError, BackendError),
)


def translated(
    error: engine_errors.EngineError, backend: str, request_id: str | None = None
) -> AsyncSGLError:
    """The frontend's error for one of the engine's."""
    if isinstance(error, engine_errors.Closed):
        return ClosedError(str(error))
    if isinstance(error, engine_errors.InternalError):
        return InternalError(str(error))
    kind = next(mine for theirs, mine in _MESSAGES if isinstance(error, theirs))
    return kind(str(error), backend=backend, request_id=request_id)


def engine_requests(request: GenRequest, prompt: Prompt, *, stream: bool) -> list[EngineRequest]:
    """One request for each of the ``n`` answers; they share the prompt's pages.

    Raises:
        InvalidRequest: the fields contradict each other.
    """
    params = request.sampling
    count = params.n or 1
    constraint = request.constraint
    grammar = Grammar(constraint.kind, constraint.source) if constraint is not None else None
    wants_prompt = params.logprob_start_len is not None and params.logprob_start_len >= 0
    return [
        EngineRequest(
            request.request_id if count == 1 else f"{request.request_id}-{index}",
            prompt.ids,
            _sampling(request, index),
            grammar,
            stream,
            return_logprob=bool(params.return_logprob or params.top_logprobs_num or wants_prompt),
            logprob_start_len=-1 if params.logprob_start_len is None else params.logprob_start_len,
            top_logprobs_num=params.top_logprobs_num or 0,
            images=prompt.images,
        )
        for index in range(count)
    ]


def prefill_request(request_id: str, prompt: Prompt) -> EngineRequest:
    """A request that generates nothing and leaves its prompt in the prefix cache."""
    return EngineRequest(request_id, prompt.ids, Sampling(max_new_tokens=0), images=prompt.images)


def scoring_request(request_id: str, prompt: Prompt, start: int) -> EngineRequest:
    """A request that generates nothing and gives its prompt's logprobs from ``start`` on."""
    return replace(
        prefill_request(request_id, prompt), return_logprob=True, logprob_start_len=start
    )


def _sampling(request: GenRequest, index: int) -> Sampling:
    params = request.sampling
    seed = params.seed
    return Sampling(
        max_new_tokens=_or(params.max_tokens, 128),
        min_new_tokens=_or(params.min_tokens, 0),
        temperature=_or(params.temperature, 1.0),
        top_p=_or(params.top_p, 1.0),
        top_k=_or(params.top_k, -1),
        min_p=_or(params.min_p, 0.0),
        frequency_penalty=_or(params.frequency_penalty, 0.0),
        presence_penalty=_or(params.presence_penalty, 0.0),
        repetition_penalty=_or(params.repetition_penalty, 1.0),
        ignore_eos=_or(params.ignore_eos, default=False),
        stop=tuple(params.stop or ()),
        stop_token_ids=tuple(params.stop_token_ids or ()),
        stop_regex=tuple(params.stop_regex or ()),
        logit_bias=tuple((params.logit_bias or {}).items()),
        seed=None if seed is None else seed + index,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def logprobs_of(
    entries: Sequence[EngineLogprob], text_of: TextOf | None
) -> tuple[TokenLogprob, ...]:
    """The engine's logprobs as the frontend's; ``text_of`` gives a token's text, if wanted."""

    def text(token: int) -> str | None:
        return text_of(token) if text_of is not None else None

    return tuple(
        TokenLogprob(
            entry.token_id,
            entry.logprob,
            text(entry.token_id),
            tuple((token, logprob, text(token)) for token, logprob in entry.top),
        )
        for entry in entries
    )


def completion_of(request: GenRequest, completion: EngineCompletion, text_of: TextOf) -> Completion:
    """One answer of the engine as the frontend's."""
    params = request.sampling
    shown = text_of if params.return_text_in_logprobs else None
    wanted = params.return_logprob or params.top_logprobs_num
    prompt = completion.prompt_logprobs
    finish = completion.finish
    return Completion(
        completion.text,
        finish.reason,
        finish.matched,
        completion.token_ids,
        logprobs_of(completion.logprobs, shown) if wanted else None,
        logprobs_of(prompt, shown) if prompt else None,
        completion_tokens=finish.completion_tokens,
    )


def scores_of(
    choices: Sequence[str], tokens: Sequence[Sequence[int]], answers: Sequence[EngineCompletion]
) -> Scores:
    """The answers to scoring requests, as the scores of a select.

    Args:
        choices: the texts.
        tokens: of each choice.
        answers: for each choice after the prompt, then, if that was asked, for each without it.
    """
    logprobs = [_prompt_logprobs(answer) for answer in answers]
    given = logprobs[: len(choices)]
    alone: Sequence[tuple[float, ...] | None] = logprobs[len(choices) :] or [None] * len(choices)
    finishes = [answer.finish for answer in answers]
    usage = Usage(
        prompt_tokens=sum(finish.prompt_tokens for finish in finishes),
        cached_tokens=sum(finish.cached_tokens for finish in finishes),
        requests=1,
    )
    scores = tuple(
        ChoiceScore(text, tuple(ids), after_prompt, by_itself)
        for text, ids, after_prompt, by_itself in zip(choices, tokens, given, alone, strict=True)
    )
    return Scores(scores, usage=usage, timings=timings_of(finishes))


def _prompt_logprobs(answer: EngineCompletion) -> tuple[float, ...]:
    values = [entry.logprob for entry in answer.prompt_logprobs]
    assert None not in values, "a scored token has a token before it"
    return tuple(value for value in values if value is not None)


class Assembly:
    """Puts the deltas of one streamed request together."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._deltas: list[EngineDelta] = []

    def add(self, delta: EngineDelta) -> None:
        """Take the next delta."""
        self._deltas.append(delta)

    def completion(self) -> EngineCompletion:
        """The whole.

        Raises:
            TruncatedStreamError: the last delta is missing.
        """
        deltas = self._deltas
        finish = deltas[-1].finish if deltas else None
        if finish is None:
            raise TruncatedStreamError(
                "the engine's stream ended early", request_id=self._request_id
            )
        return EngineCompletion(
            self._request_id,
            "".join(delta.text for delta in deltas),
            tuple(token for delta in deltas for token in delta.token_ids),
            tuple(entry for delta in deltas for entry in delta.logprobs),
            tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
            finish,
        )


def usage_of(finishes: Sequence[Finish]) -> Usage:
    """The tokens of the answers to one request; the prompt counts once."""
    return Usage(
        prompt_tokens=finishes[0].prompt_tokens,
        completion_tokens=sum(finish.completion_tokens for finish in finishes),
        cached_tokens=min(finish.cached_tokens for finish in finishes),
        requests=1,
    )


def timings_of(finishes: Sequence[Finish]) -> Timings:
    """The times of the answers to one request: to the first token, and to the last."""
    return Timings(
        total=max(finish.total_s for finish in finishes),
        first_token=min(finish.ttft_s for finish in finishes),
        queued=min(finish.queue_s for finish in finishes),
    )
