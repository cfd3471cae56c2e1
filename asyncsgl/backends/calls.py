"""What passes between the shared part of a provider's backend and its wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import BadRequestError, ContentFilterError, TruncatedStreamError
from ..types import Completion, FinishReason, Message, SamplingParams, TokenLogprob, Usage

__all__ = ["Assembly", "Call", "ParameterRejected", "Piece", "Reply", "checked_finish"]


class ParameterRejected(BadRequestError):
    """The model does not take one parameter.

    Attributes:
        parameter: its name on the wire.
    """

    parameter: str = ""

    def as_bad_request(self) -> BadRequestError:
        """The same refusal for callers, who know of no parameters to learn."""
        return BadRequestError(
            self.message, backend=self.backend, request_id=self.request_id, status=self.status
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One call to a provider: everything in it is to be sent as it is.

    Args:
        messages: the prompt.
        sampling: only fields that the wire has; stop strings that the provider takes.
        max_tokens: most tokens to generate; None to send none.
        request_id: of the program's request.
        text: the prompt as one text, for completion models.
        schema: of the structured output; None for free text.
        strict: the schema keeps to the subset that the provider can enforce.
        prefill: the last message is the assistant's, to be continued.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams
    max_tokens: int | None
    request_id: str
    text: str | None = None
    schema: Mapping[str, object] | None = None
    strict: bool = False
    prefill: bool = False

    def followed_by(self, *messages: Message) -> Call:
        """The same call with more messages at the end of its prompt."""
        return replace(self, messages=(*self.messages, *messages), prefill=False)

    def size(self) -> int:
        """Characters of the prompt's text."""
        if self.text is not None:
            return len(self.text)
        return sum(
            len(part) for message in self.messages for part in message.parts if type(part) is str
        )

    def images(self) -> int:
        """Images in the prompt."""
        return sum(type(part) is not str for message in self.messages for part in message.parts)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers to one call."""

    completions: tuple[Completion, ...]
    usage: Usage
    model: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a streamed reply; every field but ``index`` may be missing."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    matched_stop: str | None = None
    usage: Usage | None = None
    model: str = ""
    request_id: str = ""
    refusal: str = ""


@dataclass(slots=True)
class _Answer:
    texts: list[str] = field(default_factory=list[str])
    reasoning: list[str] = field(default_factory=list[str])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish: FinishReason | None = None
    matched_stop: str | None = None
    refusal: str = ""


class Assembly:
    """Puts the pieces of one streamed call together.

    Args:
        backend: the backend's name, for errors.
        count: how many answers there must be.
    """

    def __init__(self, backend: str, count: int) -> None:
        self._backend = backend
        self._answers = [_Answer() for _ in range(count)]
        self._usage: Usage | None = None
        self._model = ""
        self._request_id = ""

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self._usage = piece.usage or self._usage
        self._model = piece.model or self._model
        self._request_id = piece.request_id or self._request_id
        answer = self._answers[piece.index]
        answer.texts.append(piece.text)
        answer.reasoning.append(piece.reasoning)
        answer.logprobs += piece.logprobs
        answer.finish = piece.finish or answer.finish
        answer.matched_stop = piece.matched_stop or answer.matched_stop
        answer.refusal += piece.refusal

    def reply(self, *, logprobs: bool = False, cut: bool = False) -> Reply:
        """The whole.

        Args:
            logprobs: they were asked for.
            cut: we ended the stream ourselves, so its end marker may be missing.

        Raises:
            TruncatedStreamError: an end marker is missing.
            ContentFilterError: an answer was withheld.
        """
        usage = self._usage
        if usage is None:
            written = sum(len(text) for answer in self._answers for text in answer.texts)
            usage = Usage(0, (written + 3) // 4, requests=1)
        return Reply(
            tuple(self._completion(a, usage, logprobs, cut) for a in self._answers),
            usage,
            self._model,
            self._request_id,
        )

    @property
    def has_usage(self) -> bool:
        """Whether the provider said what the call cost."""
        return self._usage is not None

    def _completion(self, answer: _Answer, usage: Usage, logprobs: bool, cut: bool) -> Completion:
        finish: FinishReason | None = answer.finish or ("stop" if cut else None)
        if finish is None:
            raise TruncatedStreamError(
                "the stream ended without its end marker",
                backend=self._backend,
                request_id=self._request_id or None,
            )
        text = "".join(answer.texts)
        checked_finish(self._backend, finish, text, answer.refusal, self._request_id)
        share = usage.completion_tokens // len(self._answers)
        return Completion(
            text,
            finish,
            answer.matched_stop,
            logprobs=tuple(answer.logprobs) if logprobs else None,
            reasoning="".join(answer.reasoning) or None,
            completion_tokens=share,
        )


def checked_finish(
    backend: str, finish: FinishReason, text: str, refusal: str, request_id: str
) -> None:
    """Raise where an answer was withheld; one that was cut off half-way is kept.

    Raises:
        ContentFilterError: with the provider's words where it gives some.
    """
    if not text and (refusal or finish == "content_filter"):
        raise ContentFilterError(
            f"the answer was withheld: {refusal or 'for its content'}",
            backend=backend,
            request_id=request_id or None,
        )
