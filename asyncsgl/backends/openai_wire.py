"""Calls as OpenAI's wire has them, and its answers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, UnsupportedFeature
from ..types import Completion, FinishReason, Media, Message, TokenLogprob, Usage
from .calls import Call, Piece, Reply, checked_finish

if TYPE_CHECKING:
    from openai.types import Completion as TextCompletion
    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from openai.types.completion_choice import CompletionChoice
    from openai.types.completion_choice import Logprobs as TextLogprobs

__all__ = [
    "IMAGE_TYPES",
    "chat_body",
    "chat_messages",
    "chat_pieces",
    "chat_reply",
    "completion_body",
    "completion_pieces",
    "completion_reply",
    "data_url",
    "usage_of",
]

IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_FINISH: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "stop",
    "function_call": "stop",
    "eos": "stop",
    "abort": "abort",
}
MAX_TOP_LOGPROBS = 20


def data_url(media: Media, backend: str) -> str:
    """The image's address, or itself as one.

    Raises:
        UnsupportedFeature: it is in a format that the provider does not take.
    """
    if media.data is None:
        assert media.url is not None
        return media.url
    if media.media_type not in IMAGE_TYPES:
        raise UnsupportedFeature(
            backend, f"images of type {media.media_type}", "use PNG, JPEG, GIF or WebP"
        )
    return f"data:{media.media_type};base64,{base64.b64encode(media.data).decode()}"


def chat_messages(
    messages: Sequence[Message], backend: str, *, system: str = "system"
) -> list[dict[str, Any]]:
    """Messages in the form of chat completions."""
    return [
        {
            "role": system if message.role == "system" else message.role,
            "content": _content(message, backend),
        }
        for message in messages
    ]


def _content(message: Message, backend: str) -> str | list[dict[str, Any]]:
    if all(isinstance(part, str) for part in message.parts):
        return message.text
    parts: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Media):
            parts.append({"type": "image_url", "image_url": {"url": data_url(part, backend)}})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += part
        elif part:
            parts.append({"type": "text", "text": part})
    return parts


def chat_body(
    call: Call, model: str, backend: str, *, limit_name: str, system: str
) -> dict[str, Any]:
    """The parameters of ``chat.completions.create``."""
    sampling = call.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": chat_messages(call.messages, backend, system=system),
        limit_name: call.max_tokens,
        **_sampled(call),
    }
    if sampling.return_logprob or sampling.top_logprobs_num:
        body["logprobs"] = True
        body["top_logprobs"] = sampling.top_logprobs_num
    if call.schema is not None:
        schema = {"name": "answer", "schema": call.schema, "strict": call.strict}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {name: value for name, value in body.items() if value is not None}


def _sampled(call: Call) -> dict[str, Any]:
    """The fields of sampling that both forms have."""
    sampling = call.sampling
    return {
        "n": sampling.n,
        "stop": list(sampling.stop) if sampling.stop else None,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "logit_bias": _bias(call),
        "seed": sampling.seed,
    }


def completion_body(call: Call, model: str) -> dict[str, Any]:
    """The parameters of ``completions.create``."""
    sampling = call.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": call.text,
        "max_tokens": call.max_tokens,
        **_sampled(call),
    }
    if sampling.return_logprob or sampling.top_logprobs_num:
        body["logprobs"] = sampling.top_logprobs_num or 0
    return {name: value for name, value in body.items() if value is not None}


def _bias(call: Call) -> dict[str, float] | None:
    bias = call.sampling.logit_bias
    return {str(token): value for token, value in bias.items()} if bias else None


def usage_of(usage: CompletionUsage | None) -> Usage | None:
    """What a call cost."""
    if usage is None:
        return None
    prompt = getattr(usage, "prompt_tokens_details", None)
    answer = getattr(usage, "completion_tokens_details", None)
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        getattr(prompt, "cached_tokens", None) or 0,
        getattr(answer, "reasoning_tokens", None) or 0,
        1,
        getattr(prompt, "cache_write_tokens", None) or 0,
    )


def _finish(reason: str | None) -> FinishReason | None:
    return None if reason is None else _FINISH.get(reason, "stop")


def _stop_of(choice: object) -> str | None:
    """The stop that ended an answer, which some compatible servers name."""
    for name in ("matched_stop", "stop_reason"):
        value = getattr(choice, name, None)
        if isinstance(value, str):
            return value
    return None


def chat_reply(found: ChatCompletion, backend: str) -> Reply:
    """A whole chat completion.

    Raises:
        ContentFilterError: it was withheld.
        BackendError: there is none.
    """
    return _reply(found, backend, [_chat_piece(one, one.message) for one in found.choices])


def completion_reply(found: TextCompletion, backend: str) -> Reply:
    """A whole text completion. Raises as :func:`chat_reply`."""
    return _reply(found, backend, [_text_piece(one) for one in found.choices])


def chat_pieces(chunk: ChatCompletionChunk) -> Iterator[Piece]:
    """The pieces in one chunk of a stream; the last chunk has usage and no choices."""
    yield _head(chunk)
    for choice in chunk.choices:
        yield _chat_piece(choice, choice.delta)


def completion_pieces(chunk: TextCompletion) -> Iterator[Piece]:
    """The pieces in one chunk of a stream."""
    yield _head(chunk)
    for choice in chunk.choices:
        yield _text_piece(choice)


def _reply(found: Any, backend: str, pieces: Sequence[Piece]) -> Reply:
    """The answer whose choices are ``pieces``."""
    if not pieces:
        raise BackendError("the answer has no choices", backend=backend, request_id=found.id)
    usage = usage_of(getattr(found, "usage", None)) or Usage(requests=1)
    completions: list[Completion] = []
    for piece in sorted(pieces, key=lambda one: one.index):
        finish = piece.finish or "stop"
        checked_finish(backend, finish, piece.text, piece.refusal, found.id)
        completions.append(
            Completion(
                piece.text,
                finish,
                piece.matched_stop,
                logprobs=piece.logprobs or None,
                reasoning=piece.reasoning or None,
                completion_tokens=usage.completion_tokens // len(pieces),
            )
        )
    return Reply(tuple(completions), usage, found.model, found.id)


def _head(chunk: ChatCompletionChunk | TextCompletion) -> Piece:
    """What a chunk says of the whole answer."""
    return Piece(
        usage=usage_of(getattr(chunk, "usage", None)),
        model=chunk.model or "",
        request_id=chunk.id or "",
    )


def _chat_piece(choice: Any, said: Any) -> Piece:
    """One choice, whose text is in ``said``: its message, or what of it is new."""
    entries = getattr(getattr(choice, "logprobs", None), "content", None)
    return Piece(
        choice.index,
        said.content or "",
        _reasoning(said) or "",
        _chat_logprobs(entries) if entries else (),
        _finish(choice.finish_reason),
        _stop_of(choice),
        refusal=getattr(said, "refusal", None) or "",
    )


def _text_piece(choice: CompletionChoice) -> Piece:
    finish: str | None = choice.finish_reason
    return Piece(
        choice.index,
        choice.text or "",
        logprobs=_text_logprobs(choice.logprobs) if choice.logprobs is not None else (),
        finish=_finish(finish),
        matched_stop=_stop_of(choice),
    )


def _reasoning(message: object) -> str | None:
    """Reasoning in the open, as compatible servers give it."""
    value = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    return value if isinstance(value, str) else None


def _chat_logprobs(entries: Sequence[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            None,
            entry.logprob,
            entry.token,
            tuple((None, top.logprob, top.token) for top in entry.top_logprobs or ()),
        )
        for entry in entries
    )


def _text_logprobs(found: TextLogprobs) -> tuple[TokenLogprob, ...]:
    """The logprobs of a text completion."""
    tops = found.top_logprobs or []
    return tuple(
        TokenLogprob(
            None,
            logprob,
            token,
            tuple((None, value, text) for text, value in (tops[at] or {}).items())
            if at < len(tops)
            else (),
        )
        for at, (token, logprob) in enumerate(
            zip(found.tokens or [], found.token_logprobs or [], strict=False)
        )
    )
