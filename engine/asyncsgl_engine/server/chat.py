"""Messages become a prompt, by the model's own template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..tokenizer import Tokenizer
from .failures import Failure
from .openai_body import ChatMessage, Rendering
from .service import Service

__all__ = ["Rendered", "count_images", "render"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as tokens.

    Args:
        ids: token ids, with the image token where an image stands.
        images: what names the images, in their order.
    """

    ids: tuple[int, ...]
    images: tuple[str, ...]


async def render(service: Service, messages: Sequence[ChatMessage], how: Rendering) -> Rendered:
    """Messages as tokens.

    Args:
        service: has the tokenizer with the template.
        messages: at least one.
        how: how the prompt ends, and the template's own arguments.

    Raises:
        Failure: there is no template, or it refuses them.
    """
    tokenizer = service.engine.tokenizer
    if not tokenizer.whole:  # transformers is imported first
        return await asyncio.to_thread(_rendered, tokenizer, messages, how)
    return await service.off_loop(_text_size(messages), lambda: _rendered(tokenizer, messages, how))


def _text_size(messages: Sequence[ChatMessage]) -> int:
    """Characters of text in messages."""
    return sum(
        len(part if isinstance(part, str) else str(part.get("text") or ""))
        for message in messages
        for part in message.content or ()
    )


def count_images(messages: Sequence[ChatMessage]) -> int:
    """How many images messages name."""
    return sum(
        isinstance(part, dict) and part.get("type") == "image_url"
        for message in messages
        for part in message.content or ()
    )


def _rendered(tokenizer: Tokenizer, messages: Sequence[ChatMessage], how: Rendering) -> Rendered:
    if tokenizer.chat_template is None:
        message = "this model has no chat template; send text to /v1/completions instead"
        raise Failure(400, message, "messages")
    continues = how.continue_final_message
    if continues and messages[-1].role != "assistant":
        message = "continue_final_message needs a last message of the assistant"
        raise Failure(400, message, "continue_final_message")
    images: list[str] = []
    parts = tokenizer.template_wants_parts
    turns = [_turn(message, images, parts) for message in messages]
    try:
        text = tokenizer.hf.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=how.add_generation_prompt and not continues,
            continue_final_message=continues,
            **_arguments(how),
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise Failure(
            400, f"messages: the model's chat template refuses them: {error}", "messages"
        ) from error
    ids = tokenizer.encode(str(text), add_special_tokens=False)
    if not ids:
        raise Failure(400, "messages: the model's chat template makes no text of them", "messages")
    return Rendered(tuple(ids), tuple(images))


def _arguments(how: Rendering) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(how.chat_template_kwargs or {})
    if how.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", how.reasoning_effort)
    own = {"tokenize", "add_generation_prompt", "continue_final_message", "conversation"}
    if own & arguments.keys():
        message = f"chat_template_kwargs: {', '.join(sorted(own & arguments.keys()))} are ours"
        raise Failure(400, message, "chat_template_kwargs")
    return arguments


def _turn(message: ChatMessage, images: list[str], wants_parts: bool) -> dict[str, Any]:
    """A message as templates know it; `images` takes what names its images."""
    given = message.model_dump(exclude_none=True)
    before = len(images)
    parts = _parts(message.content, images)
    if wants_parts or len(images) > before:
        given["content"] = parts
    else:
        given["content"] = "".join(part["text"] for part in parts)
    return given


def _parts(content: str | list[dict[str, Any]] | None, images: list[str]) -> list[dict[str, str]]:
    """Content as a list of parts; texts that follow each other are one."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    parts: list[dict[str, str]] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                if parts and parts[-1]["type"] == "text":
                    parts[-1]["text"] += text
                else:
                    parts.append({"type": "text", "text": text})
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)} if url:
                images.append(url)
                parts.append({"type": "image"})
            case _:
                kind = part.get("type")
                problem = f"a part of type {kind!r}: text is {{'type': 'text', 'text': …}} and an "
                problem += "image {'type': 'image_url', 'image_url': {'url': …}}"
                raise Failure(400, f"messages: {problem}", "messages")
    return parts
