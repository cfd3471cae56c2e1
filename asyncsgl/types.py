"""The frozen values that pass between programs and backends."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypedDict

from .errors import InvalidArgument

__all__ = [
    "ChoiceScore",
    "Completion",
    "Constraint",
    "Delta",
    "FinishReason",
    "GenRequest",
    "Generation",
    "Media",
    "Message",
    "Meta",
    "Overrides",
    "Part",
    "Role",
    "SamplingOverrides",
    "SamplingParams",
    "Scores",
    "Timings",
    "TokenLogprob",
    "Usage",
]

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort", "content_filter"]


@dataclass(frozen=True, slots=True)
class Media:
    """One image or video of a prompt.

    Args:
        kind: ``"image"`` or ``"video"``.
        data: the file's bytes; ``None`` where only the address is known.
        media_type: such as ``"image/png"``, found from the content.
        url: the address it came from, if it was named by one.
        name: how error messages call it.
        frames: of a video, the sampled frames, each an image's bytes.
    """

    kind: Literal["image", "video"]
    data: bytes | None = None
    media_type: str = ""
    url: str | None = None
    name: str = ""
    frames: tuple[bytes, ...] = ()


Part = str | Media


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a prompt.

    Args:
        role: who speaks; ``None`` for raw text outside of any role.
        parts: the content in order, texts and media.
    """

    role: Role | None
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The texts of this message, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


class SamplingOverrides(TypedDict, total=False):
    """The sampling keywords that ``gen`` and ``run`` take; see :class:`SamplingParams`."""

    max_tokens: int | None
    min_tokens: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    stop_regex: str | Sequence[str] | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    return_logprob: bool | None
    logprob_start_len: int | None
    top_logprobs_num: int | None
    return_text_in_logprobs: bool | None


class Overrides(SamplingOverrides, total=False):
    """:class:`SamplingOverrides` with ``max_new_tokens``, another name of ``max_tokens``."""

    max_new_tokens: int | None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one generation. ``None`` leaves a field to the next default.

    The order of precedence: the ``gen``'s own value, the run's, the backend's.

    Args:
        max_tokens: most tokens to generate, 0 or more (0 only computes the prompt).
        min_tokens: no end of sequence before so many tokens.
        n: how many answers to sample, 1 to 128.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end the text.
        stop_regex: regular expressions that end the text where they match.
        temperature: 0 (greedy) to 2 and above.
        top_p: sample from the smallest set of tokens with this probability, (0, 1].
        top_k: sample from this many most probable tokens; -1 for all.
        min_p: drop tokens less probable than this share of the best, [0, 1].
        frequency_penalty: -2 to 2, for each time that a token was generated.
        presence_penalty: -2 to 2, for tokens that were generated at all.
        repetition_penalty: above 0; over 1 makes repeated tokens less probable.
        ignore_eos: go on after the end-of-sequence token.
        logit_bias: token id to a value added to its logit, -100 to 100.
        seed: makes sampling repeatable.
        return_logprob: give the logprobs of the generated tokens.
        logprob_start_len: also give the prompt's logprobs from this token on; -1 for none.
        top_logprobs_num: for each token, also the best alternatives, 0 or more.
        return_text_in_logprobs: give the tokens' texts with the logprobs.

    Raises:
        InvalidArgument: a value is of the wrong kind or out of its range.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_regex: str | Sequence[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None

    def __post_init__(self) -> None:
        for name, bound in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None:
                bound.check(name, value)
        for name in _SWITCHES:
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise InvalidArgument(name, f"must be True or False, got {value!r}")
        for name, check in _STOPS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(map(check, _as_tuple(name, value))))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise InvalidArgument(
                "min_tokens",
                f"must be at most max_tokens, which is {self.max_tokens}, got {self.min_tokens}",
            )

    def merged(self, over: SamplingParams) -> SamplingParams:
        """These parameters with every field that ``over`` sets taken from it."""
        if over is UNSET:
            return self
        if self is UNSET:
            return over
        return replace(self, **{name: getattr(over, name) for name in over.given()})

    def given(self) -> tuple[str, ...]:
        """The names of the fields that are set."""
        if self is UNSET:
            return ()
        return tuple(name for name in SAMPLING_FIELDS if getattr(self, name) is not None)


@dataclass(frozen=True, slots=True)
class _Bound:
    """The kind and range of one numeric field."""

    whole: bool
    low: float
    high: float = math.inf
    open_low: bool = False
    also: float | None = None

    def check(self, field: str, value: object) -> None:
        kinds = (int,) if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "a whole number" if self.whole else "a number"
            raise InvalidArgument(field, f"must be {wanted}, got {value!r}")
        if value == self.also:
            return
        low_ok = value > self.low if self.open_low else value >= self.low
        if not (low_ok and value <= self.high and value != math.inf):
            raise InvalidArgument(field, f"must be {self._words()}, got {value!r}")

    def _words(self) -> str:
        relation = "above" if self.open_low else "at least"
        words = f"{relation} {self.low:g}"
        if self.high != math.inf:
            words += f" and at most {self.high:g}"
        return words + (f", or {self.also:g}" if self.also is not None else "")


_BOUNDS = {
    "max_tokens": _Bound(True, 0),
    "min_tokens": _Bound(True, 0),
    "n": _Bound(True, 1, 128),
    "temperature": _Bound(False, 0),
    "top_p": _Bound(False, 0, 1, open_low=True),
    "top_k": _Bound(True, 1, also=-1),
    "min_p": _Bound(False, 0, 1),
    "frequency_penalty": _Bound(False, -2, 2),
    "presence_penalty": _Bound(False, -2, 2),
    "repetition_penalty": _Bound(False, 0, 2, open_low=True),
    "seed": _Bound(True, -(2**63), 2**63 - 1),
    "logprob_start_len": _Bound(True, 0, also=-1),
    "top_logprobs_num": _Bound(True, 0, 1000),
}
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))


def _as_tuple(field: str, value: object) -> tuple[object, ...]:
    if isinstance(value, str) and field != "stop_token_ids":
        return (value,)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(value)
    raise InvalidArgument(field, f"must be a sequence, got {value!r}")


def _stop_text(text: object) -> object:
    if not isinstance(text, str) or not text:
        raise InvalidArgument("stop", f"must be non-empty strings, got {text!r}")
    return text


def _stop_regex(pattern: object) -> object:
    if not isinstance(pattern, str) or not pattern:
        raise InvalidArgument("stop_regex", f"must be non-empty strings, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidArgument(
            "stop_regex", f"{pattern!r} is not a regular expression: {error}"
        ) from error
    return pattern


def _stop_token(token: object) -> object:
    _TOKEN_ID.check("stop_token_ids", token)
    return token


_SWITCHES = ("ignore_eos", "return_logprob", "return_text_in_logprobs")
_STOPS = {"stop": _stop_text, "stop_regex": _stop_regex, "stop_token_ids": _stop_token}
_TOKEN_ID = _Bound(True, 0)
_BIAS = _Bound(False, -100, 100)
UNSET = SamplingParams()
"""No field set; shared, since most generations and runs set none."""


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise InvalidArgument("logit_bias", f"must map token ids to numbers, got {bias!r}")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        if isinstance(token, str) and token.isdecimal():
            token = int(token)  # JSON has only texts as keys
        _TOKEN_ID.check("logit_bias", token)
        _BIAS.check("logit_bias", value)
        checked[int(token)] = float(value)
    return checked


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the text of one generation must look like.

    Args:
        kind: the language of ``source``.
        source: a regular expression that the whole text matches, a JSON schema as
            canonical JSON, or an EBNF grammar.
        label: how error messages call it.
    """

    kind: Literal["regex", "json_schema", "ebnf"]
    source: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class GenRequest:
    """One model call, complete and frozen.

    Args:
        messages: the prompt. The last one is the assistant's and is to be continued
            when the call is inside an assistant turn (its parts may be empty).
        sampling: how to sample.
        text: the prompt as one text, for backends that want text.
        constraint: what the text must look like.
        request_id: unique in this process.
        continue_assistant: whether the last message is the assistant's, to be continued.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams
    request_id: str
    text: str | None = None
    constraint: Constraint | None = None
    continue_assistant: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted over one or more calls.

    Args:
        prompt_tokens: of the prompts, those from a cache and those written to one included.
        completion_tokens: of the answers, the reasoning before them included.
        cached_tokens: those of the prompts that came from a cache.
        reasoning_tokens: those of the answers that were reasoning.
        requests: calls.
        cache_write_tokens: those of the prompts that were written to a cache, where the
            provider says so: some charge more for them.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    requests: int = 0
    cache_write_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        if not self.requests and self == _NOTHING:
            return other
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.requests + other.requests,
            self.cache_write_tokens + other.cache_write_tokens,
        )


_NOTHING = Usage()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its logprob (natural logarithm).

    Args:
        token_id: the token's id; ``None`` where the provider gives only texts.
        logprob: ``None`` for the first token of a prompt, which has none.
        text: the token's text, where asked for.
        top: the best alternatives as (token id, logprob, text).
    """

    token_id: int | None
    logprob: float | None
    text: str | None = None
    top: tuple[tuple[int | None, float, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one call took.

    Args:
        total: from the hand-over to the end.
        first_token: from the hand-over to the first token, where it is known.
        queued: waiting before the work began, where it is known.
    """

    total: float = 0.0
    first_token: float | None = None
    queued: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of a generation."""

    text: str
    finish_reason: FinishReason = "stop"
    matched_stop: str | int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str | None = None
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one model call: its answers and what they cost.

    Args:
        completions: ``n`` answers.
        usage: tokens of the whole call.
        request_id: the backend's id of the call.
        model: the model that answered.
        timings: seconds spent.
        emulated: the features that were emulated, each said in words.
    """

    completions: tuple[Completion, ...]
    usage: Usage = Usage()
    request_id: str = ""
    model: str = ""
    timings: Timings = Timings()
    emulated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed generation.

    The last delta of a stream, and only it, has the whole ``generation``.

    Args:
        text: new text of answer ``index``.
        index: which of the ``n`` answers.
        reasoning: new text of the model's separate reasoning.
        logprobs: of the new tokens, where asked for.
        generation: the finished result.
    """

    text: str = ""
    index: int = 0
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    generation: Generation | None = None


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """How probable one choice is after a prefix.

    Args:
        text: the choice.
        token_ids: the tokens that the choice adds to the prefix, never empty.
        logprobs: one for each of ``token_ids``.
        unconditional: the logprobs of the same tokens without the prefix, where asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    unconditional: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of all choices of one ``select``, or the decision of an emulation.

    Args:
        choices: in the order of the request; empty when ``decision`` is set.
        decision: the index of the choice that an emulating backend made.
        usage: tokens of the calls that were made.
        emulated: how it was emulated, in words.
    """

    choices: tuple[ChoiceScore, ...] = ()
    decision: int | None = None
    usage: Usage = Usage()
    emulated: tuple[str, ...] = ()
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True)
class Meta:
    """How a variable came about.

    Args:
        finish_reason: why the text ended; None for a variable that no model wrote.
        matched_stop: the stop string or token id that ended it.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated for this text.
        cached_tokens: tokens of the prompt whose computation was saved.
        logprobs: of the generated tokens, where asked for.
        prompt_logprobs: of the prompt's tokens, where asked for.
        choices: of a ``select``, its texts.
        choice_scores: of a ``select``, one score a choice on the scale of its method.
        choice_logprobs: of a ``select``, the logprobs of each choice's tokens.
        timings: seconds spent.
        model: the model that answered.
        backend: the backend that was asked.
        request_id: the call's id.
        emulated: what the backend does not have and was made from other features.
        error: why a typed value cannot be had, where it cannot.
    """

    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[str, ...] | None = None
    choice_scores: tuple[float, ...] | None = None
    choice_logprobs: tuple[tuple[float, ...], ...] | None = None
    timings: Timings = Timings()
    model: str = ""
    backend: str = ""
    request_id: str = ""
    emulated: tuple[str, ...] = ()
    error: str | None = None
