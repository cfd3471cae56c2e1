"""Calls as Anthropic's Messages API has them, and its answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedFeature
from ..types import Completion, FinishReason, Media, Message, Usage
from .calls import Call, Piece, Reply, checked_finish

if TYPE_CHECKING:
    from anthropic.types import Message as AnthropicMessage
    from anthropic.types import RawMessageStreamEvent

__all__ = [
    "CACHED_CHARACTERS",
    "Pieces",
    "message_body",
    "message_reply",
    "shared_prefix",
    "size_of",
]

_IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_FINISH: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
_SAMPLING_VERSION = "2023-06-01"
"""The last version of the API that takes sampling parameters."""
_IMAGE_CHARACTERS = 6000
CACHED_CHARACTERS = 4096
"""Prompts that are shorter are not cached: the service wants 1,024 tokens and more."""


def message_body(call: Call, model: str, backend: str, *, cached: bool) -> dict[str, Any]:
    """The parameters of ``messages.create``.

    Args:
        call: what to send.
        model: its name.
        backend: the backend's name.
        cached: mark the prompt before its last turn to be kept by the service.

    Raises:
        UnsupportedFeature: no turn is left beside the system's, or an image cannot be sent.
    """
    system = "\n\n".join(m.text for m in call.messages if m.role == "system" and m.text)
    turns = [message for message in call.messages if message.role != "system"]
    if not turns:
        raise UnsupportedFeature(
            backend, "a prompt of system turns alone", "add a turn with sgl.user(...)"
        )
    messages = [
        {"role": turn.role, "content": _blocks(turn, backend, last and call.prefill)}
        for turn, last in zip(turns, [False] * (len(turns) - 1) + [True], strict=True)
    ]
    messages = [message for message in messages if message["content"]]
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": call.max_tokens,
    }
    if system:
        body["system"] = [{"type": "text", "text": system}]
    if cached:
        _mark(body, len(shared_prefix(turns)))
    if call.sampling.stop:
        body["stop_sequences"] = list(call.sampling.stop)
    if call.schema is not None:
        body["output_config"] = {"format": {"type": "json_schema", "schema": call.schema}}
    sampling = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(call.sampling, name)) is not None
    }
    if sampling:
        body |= sampling
        body["extra_headers"] = {"anthropic-version": _SAMPLING_VERSION}
    return body


def size_of(messages: Sequence[Message]) -> int:
    """Characters of text, and what images weigh beside them."""
    return sum(
        len(part) if isinstance(part, str) else _IMAGE_CHARACTERS
        for message in messages
        for part in message.parts
    )


def shared_prefix(turns: Sequence[Message]) -> Sequence[Message]:
    """The turns that other prompts may share: all but the last of the user's and what follows."""
    last = max((at for at, turn in enumerate(turns) if turn.role == "user"), default=0)
    return turns[:last]


def _mark(body: dict[str, Any], shared: int) -> None:
    """Ask the service to keep the prompt up to and with the turn before ``shared``."""
    block: dict[str, Any] | None = None
    if shared:
        block = body["messages"][shared - 1]["content"][-1]
    elif "system" in body:
        block = body["system"][-1]
    if block is not None:
        block["cache_control"] = {"type": "ephemeral"}


def _blocks(message: Message, backend: str, prefill: bool) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Media):
            blocks.append(_image(part, backend))
        elif blocks and blocks[-1]["type"] == "text":
            blocks[-1]["text"] += part
        elif part:
            blocks.append({"type": "text", "text": part})
    if prefill and blocks and blocks[-1]["type"] == "text":
        blocks[-1]["text"] = blocks[-1]["text"].rstrip()  # the service refuses a trailing space
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def _image(media: Media, backend: str) -> dict[str, Any]:
    if media.data is None:
        return {"type": "image", "source": {"type": "url", "url": media.url}}
    if media.media_type not in _IMAGE_TYPES:
        raise UnsupportedFeature(
            backend, f"images of type {media.media_type}", "use PNG, JPEG, GIF or WebP"
        )
    source = {
        "type": "base64",
        "media_type": media.media_type,
        "data": base64.b64encode(media.data).decode(),
    }
    return {"type": "image", "source": source}


def _usage(usage: Any) -> Usage:
    written, read = usage.cache_creation_input_tokens or 0, usage.cache_read_input_tokens or 0
    details = getattr(usage, "output_tokens_details", None)
    thought = getattr(details, "thinking_tokens", None) or 0
    return Usage(
        (usage.input_tokens or 0) + written + read,
        usage.output_tokens or 0,
        read,
        thought,
        1,
        written,
    )


def _spaced(call: Call) -> bool:
    """Whether white space at the end of the turn that is continued was not sent."""
    text = call.messages[-1].text if call.prefill else ""
    return text != text.rstrip()


def _refusal(finish: FinishReason | None) -> str:
    return "the model refused" if finish == "content_filter" else ""


def message_reply(found: AnthropicMessage, call: Call, backend: str) -> Reply:
    """A whole message; its thinking apart from its text.

    Raises:
        ContentFilterError: the model refused to answer.
    """
    text = "".join(block.text for block in found.content if block.type == "text")
    thought = "".join(block.thinking for block in found.content if block.type == "thinking")
    finish = _FINISH.get(found.stop_reason or "", "stop")
    checked_finish(backend, finish, text, _refusal(finish), found.id)
    usage = _usage(found.usage)
    completion = Completion(
        text.lstrip() if _spaced(call) else text,
        finish,
        found.stop_sequence,
        reasoning=thought or None,
        completion_tokens=usage.completion_tokens,
    )
    return Reply((completion,), usage, found.model, found.id)


class Pieces:
    """Turns the events of one stream into pieces.

    Args:
        call: what was asked.
    """

    def __init__(self, call: Call) -> None:
        self._usage: Usage | None = None
        self._strip = _spaced(call)
        self._finish: FinishReason | None = None
        self._matched: str | None = None
        self._model = ""
        self._id = ""

    def take(self, event: RawMessageStreamEvent) -> Piece | None:
        """The piece in one event; the finish comes with ``message_stop``, the end marker."""
        match event.type:
            case "message_start":
                self._usage = _usage(event.message.usage)
                return Piece(model=event.message.model, request_id=event.message.id)
            case "content_block_start":
                return self._text(getattr(event.content_block, "text", None) or "")
            case "content_block_delta":
                if event.delta.type == "thinking_delta":
                    return Piece(reasoning=event.delta.thinking)
                return self._text(event.delta.text) if event.delta.type == "text_delta" else None
            case "message_delta":
                self._finish = _FINISH.get(event.delta.stop_reason or "", "stop")
                self._matched = event.delta.stop_sequence
                self._add(event.usage)
                return None
            case "message_stop":
                return Piece(
                    finish=self._finish,
                    matched_stop=self._matched,
                    usage=self._usage,
                    refusal=_refusal(self._finish),
                )
            case _:
                return None

    def _text(self, text: str) -> Piece | None:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        return Piece(text=text) if text else None

    def _add(self, last: Any) -> None:
        if self._usage is None or last.input_tokens is not None:
            self._usage = _usage(last)
            return
        details = getattr(last, "output_tokens_details", None)
        thought = getattr(details, "thinking_tokens", None) or self._usage.reasoning_tokens
        self._usage = replace(
            self._usage, completion_tokens=last.output_tokens, reasoning_tokens=thought
        )
