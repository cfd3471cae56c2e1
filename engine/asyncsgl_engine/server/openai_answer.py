"""From what the engine gives to OpenAI's forms of an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ..request import Completion, Delta, Finish, TokenLogprob
from .native_answer import TextOf
from .openai_asks import Asked

__all__ = ["ChatForm", "CompletionForm", "Form", "Stream", "answer", "usage_of"]


BytesOf = Callable[[int], bytes]


class Form(Protocol):
    """How one kind of answer is written."""

    whole: str
    chunk: str

    def choice(self, index: int, done: Completion, echo: str | None, /) -> dict[str, Any]:
        """A finished answer."""
        ...

    def first(self, index: int, echo: str | None, /) -> dict[str, Any] | None:
        """What a stream begins with."""
        ...

    def piece(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """What a delta adds, if anything."""
        ...

    def last(self, index: int, finish: Finish) -> dict[str, Any]:
        """The end."""
        ...


def _ending(finish: Finish) -> dict[str, Any]:
    return {"finish_reason": finish.reason, "matched_stop": finish.matched}


_OPEN = {"finish_reason": None, "matched_stop": None}


class ChatForm:
    """Chat completions.

    Args:
        text_of: gives a token's text.
        bytes_of: gives a token's bytes, which may be part of a character.
        scored: whether log-probabilities are wanted.
    """

    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, text_of: TextOf, bytes_of: BytesOf, scored: bool) -> None:
        self._text_of = text_of
        self._bytes_of = bytes_of
        self._scored = scored

    def choice(self, index: int, done: Completion, _echo: str | None) -> dict[str, Any]:
        """See `Form`."""
        message = {"role": "assistant", "content": done.text, "refusal": None, "tool_calls": None}
        logprobs = self._logprobs(done.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, **_ending(done.finish)}

    def first(self, index: int, _echo: str | None) -> dict[str, Any] | None:
        """See `Form`."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            **_OPEN,
        }

    def piece(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """See `Form`."""
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        if not delta.text and logprobs is None:
            return None
        return {"index": index, "delta": {"content": delta.text}, "logprobs": logprobs, **_OPEN}

    def last(self, index: int, finish: Finish) -> dict[str, Any]:
        """See `Form`."""
        return {"index": index, "delta": {}, "logprobs": None, **_ending(finish)}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token_id, entry.logprob),
                    "top_logprobs": [self._token(*each) for each in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._text_of(token),
            "logprob": logprob,
            "bytes": list(self._bytes_of(token)),
        }


class CompletionForm:
    """Completions of text.

    Args:
        text_of: gives a token's text.
        scored: whether log-probabilities are wanted.
        count: how many answers there are.
    """

    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, text_of: TextOf, scored: bool, count: int) -> None:
        self._text_of = text_of
        self._scored = scored
        self._offsets = [0] * count

    def choice(self, index: int, done: Completion, echo: str | None) -> dict[str, Any]:
        """See `Form`."""
        logprobs = self._logprobs(index, [*done.prompt_logprobs, *done.logprobs])
        text = (echo or "") + done.text
        return {"index": index, "text": text, "logprobs": logprobs, **_ending(done.finish)}

    def first(self, index: int, echo: str | None) -> dict[str, Any] | None:
        """See `Form`."""
        if echo is None:
            return None
        return {"index": index, "text": echo, "logprobs": None, **_OPEN}

    def piece(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """See `Form`."""
        entries = [*delta.prompt_logprobs, *delta.logprobs]
        if not delta.text and not entries:
            return None
        logprobs = self._logprobs(index, entries)
        return {"index": index, "text": delta.text, "logprobs": logprobs, **_OPEN}

    def last(self, index: int, finish: Finish) -> dict[str, Any]:
        """See `Form`."""
        return {"index": index, "text": "", "logprobs": None, **_ending(finish)}

    def _logprobs(self, index: int, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        tokens, values, tops, offsets = [], [], [], []
        for entry in entries:
            text = self._text_of(entry.token_id)
            tokens.append(text)
            values.append(entry.logprob)
            tops.append({self._text_of(token): value for token, value in entry.top} or None)
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def usage_of(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """How many tokens an answer took."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "reasoning_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def answer(asked: Asked, form: Form, model: str, done: Sequence[Completion]) -> dict[str, Any]:
    """The whole answer.

    Args:
        asked: what was asked.
        form: of this kind of answer.
        model: the name to tell.
        done: one completion a request.
    """
    echoes = asked.echo or None
    firsts = done[:: asked.n]
    return {
        "id": asked.name,
        "object": form.whole,
        "created": int(time.time()),
        "model": model,
        "choices": [
            form.choice(index, each, echoes[index // asked.n] if echoes else None)
            for index, each in enumerate(done)
        ],
        "usage": usage_of(
            sum(each.finish.prompt_tokens for each in firsts),
            sum(each.finish.completion_tokens for each in done),
            sum(each.finish.cached_tokens for each in firsts),
        ),
        "system_fingerprint": None,
    }


class Stream:
    """Chunks of a growing answer.

    Args:
        asked: what was asked.
        form: of this kind of answer.
        model: the name to tell.
    """

    def __init__(self, asked: Asked, form: Form, model: str) -> None:
        self._asked = asked
        self._form = form
        self._frame = {
            "id": asked.name,
            "object": form.chunk,
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()
        firsts = asked.requests[:: asked.n]
        self._prompt_tokens = sum(len(request.prompt_ids) for request in firsts)
        self._completion_tokens = 0
        self._cached_tokens = 0

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """What a delta adds to the stream."""
        asked, form = self._asked, self._form
        choices: list[dict[str, Any] | None] = []
        if index not in self._begun:
            self._begun.add(index)
            echo = asked.echo[index // asked.n] if asked.echo else None
            choices.append(form.first(index, echo))
        self._completion_tokens += len(delta.token_ids)
        choices.append(form.piece(index, delta))
        if delta.finish is not None:
            choices.append(form.last(index, delta.finish))
            if index % asked.n == 0:
                self._cached_tokens += delta.finish.cached_tokens
        return [self._chunk([choice]) for choice in choices if choice is not None]

    def end(self) -> list[dict[str, Any]]:
        """What comes after the last choice."""
        if not self._asked.usage[0]:
            return []
        return [{**self._frame, "choices": [], "usage": self._usage()}]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        wanted, always = self._asked.usage
        usage = {"usage": self._usage() if always else None} if wanted else {}
        return {**self._frame, "choices": choices, **usage}

    def _usage(self) -> dict[str, Any]:
        return usage_of(self._prompt_tokens, self._completion_tokens, self._cached_tokens)
