"""The frozen values that pass between programs and backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .sampling import Overrides, SamplingOverrides, SamplingParams

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
