"""Calls as Gemini's API has them, and its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, ContentFilterError, UnsupportedFeature
from ..types import Completion, FinishReason, Media, Message, TokenLogprob, Usage
from .base import Capabilities
from .calls import Call, Piece, Reply, checked_finish
from .planning import Profile
from .schemas import GEMINI

if TYPE_CHECKING:
    from google.genai.types import Candidate, GenerateContentResponse, LogprobsResult

__all__ = ["config_of", "contents_of", "profile_of", "reply_of", "response_pieces"]

_IMAGE_TYPES = frozenset(
    {"image/png", "image/jpeg", "image/webp", "image/heic", "image/heif", "image/gif"}
)
_FINISH: Mapping[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "CONTINUATION": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "MODEL_ARMOR": "content_filter",
    "LANGUAGE": "content_filter",
    "ESCALATION": "content_filter",
    "PUP_LIMITED_DISABLED": "content_filter",
    "OTHER": "abort",
    "MALFORMED_RESPONSE": "abort",
    "MALFORMED_FUNCTION_CALL": "abort",
    "UNEXPECTED_TOOL_CALL": "abort",
    "TOO_MANY_TOOL_CALLS": "abort",
    "MISSING_THOUGHT_SIGNATURE": "abort",
}
_SAMPLING = frozenset(
    {
        "max_tokens",
        "stop",
        "temperature",
        "top_p",
        "top_k",
        "frequency_penalty",
        "presence_penalty",
        "seed",
        "return_logprob",
        "top_logprobs_num",
        "return_text_in_logprobs",
    }
)
_NOT_THERE = "the API has no such parameter: leave it out, or use a local Runtime"
_CAPABILITIES = Capabilities(
    native=frozenset({"chat", "image", "json_schema", *_SAMPLING}),
    emulated=frozenset(
        {
            "raw_text",
            "continue_assistant",
            "select",
            "regex",
            "stop_regex",
            "n",
            "reasoning",
        }
    ),
    hints={
        "min_tokens": _NOT_THERE,
        "ignore_eos": _NOT_THERE,
        "repetition_penalty": "the API has no such parameter: use frequency_penalty",
        "logit_bias": _NOT_THERE,
        "min_p": "the API has no such parameter: use top_p or top_k",
        "stop_token_ids": "use stop=, with strings",
        "logprob_start_len": "the API gives no logprobs of the prompt: use a local Runtime",
        "ebnf": "use json_schema or regex, or a local Runtime",
        "video": "send frames of it with sgl.image(...)",
    },
)
_GEMINI = re.compile(r"gemini-(\d+)(?:\.(\d+))?")
MAX_TOP_LOGPROBS = 20


def profile_of(model: str) -> Profile:
    """What ``model`` takes; those that think get no limit unless one is asked for."""
    found = _GEMINI.search(model)
    thinks = found is None or (int(found[1]), int(found[2] or 0)) >= (2, 5)
    if "gemini-pro" in model:
        thinks = False
    return Profile(
        _CAPABILITIES,
        max_stops=5,
        max_answers=1,
        dialect=GEMINI,
        default_max_tokens=None if thinks else 128,
    )


def contents_of(messages: Sequence[Message], backend: str) -> list[dict[str, Any]]:
    """The turns beside the system's.

    Raises:
        UnsupportedFeature: there are none, or an image cannot be sent.
    """
    turns = [
        {
            "role": "model" if message.role == "assistant" else "user",
            "parts": [_part(part, backend) for part in message.parts if part],
        }
        for message in messages
        if message.role != "system" and message.parts
    ]
    if not turns:
        raise UnsupportedFeature(
            backend, "a prompt of system turns alone", "add a turn with sgl.user(...)"
        )
    return turns


def _part(part: str | Media, backend: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"text": part}
    if part.data is None:
        assert part.url is not None
        return {"fileData": {"fileUri": part.url, "mimeType": _type_by_name(part.url)}}
    if part.media_type not in _IMAGE_TYPES:
        raise UnsupportedFeature(
            backend, f"images of type {part.media_type}", "use PNG, JPEG, GIF, WebP or HEIC"
        )
    return {"inlineData": {"data": part.data, "mimeType": part.media_type}}


def _type_by_name(url: str) -> str:
    """The media type by an address's ending, as the service does not look itself."""
    ending = url.partition("?")[0].rpartition(".")[2].lower()
    named = {"png": "png", "gif": "gif", "webp": "webp", "heic": "heic"}
    return f"image/{named.get(ending, 'jpeg')}"


def config_of(call: Call, more: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of one call; ``more`` is the backend's own."""
    sampling = call.sampling
    system = "\n\n".join(m.text for m in call.messages if m.role == "system" and m.text)
    config: dict[str, Any] = {
        "system_instruction": system or None,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_output_tokens": call.max_tokens,
        "stop_sequences": list(sampling.stop) if sampling.stop else None,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "seed": sampling.seed,
        "automatic_continuation": False,
        "automatic_function_calling": {"disable": True},
    }
    if sampling.return_logprob or sampling.top_logprobs_num:
        config["response_logprobs"] = True
        config["logprobs"] = sampling.top_logprobs_num
    if call.schema is not None:
        config["response_mime_type"] = "application/json"
        config["response_json_schema"] = call.schema
    return {name: value for name, value in config.items() if value is not None} | dict(more)


def usage_of(found: GenerateContentResponse) -> Usage | None:
    """What a call cost; thoughts count as a part of the answer."""
    usage = found.usage_metadata
    if usage is None:
        return None
    thoughts = usage.thoughts_token_count or 0
    return Usage(
        usage.prompt_token_count or 0,
        (usage.candidates_token_count or 0) + thoughts,
        usage.cached_content_token_count or 0,
        thoughts,
        1,
    )


def check_prompt(found: GenerateContentResponse, backend: str) -> None:
    """Raise where the prompt itself was refused.

    Raises:
        ContentFilterError: with the reasons.
    """
    feedback = found.prompt_feedback
    if feedback is None or not feedback.block_reason:
        return
    words = [f"the prompt was blocked: {feedback.block_reason.value}"]
    if feedback.block_reason_message:
        words.append(feedback.block_reason_message)
    words += _ratings(feedback.safety_ratings)
    raise ContentFilterError(
        ", ".join(words), backend=backend, request_id=found.response_id or None
    )


def _ratings(ratings: Sequence[Any] | None) -> list[str]:
    return [
        f"{rating.category.value} is {rating.probability.value}"
        for rating in ratings or ()
        if rating.category and rating.probability
        if rating.blocked or rating.probability.value in ("HIGH", "MEDIUM")
    ]


def _finish(candidate: Candidate) -> FinishReason | None:
    reason = candidate.finish_reason
    if reason is None or reason.value == "FINISH_REASON_UNSPECIFIED":
        return None
    return _FINISH.get(reason.value, "stop")


def _texts(candidate: Candidate) -> tuple[str, str]:
    """The text, and the thoughts."""
    parts = (candidate.content.parts if candidate.content is not None else None) or []
    text = "".join(part.text or "" for part in parts if not part.thought)
    return text, "".join(part.text or "" for part in parts if part.thought)


def _refusal(candidate: Candidate, text: str) -> str:
    """Why an answer was withheld; empty where there is one."""
    if _finish(candidate) != "content_filter" or text:
        return ""
    assert candidate.finish_reason is not None
    words = [candidate.finish_reason.value, candidate.finish_message or ""]
    return ", ".join(word for word in [*words, *_ratings(candidate.safety_ratings)] if word)


def _logprobs(found: LogprobsResult | None) -> tuple[TokenLogprob, ...]:
    if found is None:
        return ()
    tops = found.top_candidates or []
    return tuple(
        TokenLogprob(
            entry.token_id,
            entry.log_probability,
            entry.token,
            tuple(
                (top.token_id, top.log_probability or 0.0, top.token)
                for top in (tops[at].candidates or () if at < len(tops) else ())
            ),
        )
        for at, entry in enumerate(found.chosen_candidates or ())
    )


def reply_of(found: GenerateContentResponse, call: Call, backend: str) -> Reply:
    """A whole answer.

    Raises:
        ContentFilterError: the prompt or the answer was refused; says why.
        BackendError: there is no answer.
    """
    check_prompt(found, backend)
    if not found.candidates:
        raise BackendError(
            "the answer has no candidates", backend=backend, request_id=found.response_id
        )
    candidate = found.candidates[0]
    text, thoughts = _texts(candidate)
    finish = _finish(candidate) or "stop"
    request_id = found.response_id or ""
    checked_finish(backend, finish, text, _refusal(candidate, text), request_id)
    usage = usage_of(found) or Usage(requests=1)
    wanted = call.sampling.return_logprob or call.sampling.top_logprobs_num
    completion = Completion(
        text,
        finish,
        logprobs=_logprobs(candidate.logprobs_result) if wanted else None,
        reasoning=thoughts or None,
        completion_tokens=usage.completion_tokens,
    )
    return Reply((completion,), usage, found.model_version or "", request_id)


def response_pieces(found: GenerateContentResponse, backend: str) -> Iterator[Piece]:
    """The pieces in one part of a stream.

    Raises:
        ContentFilterError: the prompt was refused.
    """
    check_prompt(found, backend)
    yield Piece(
        usage=usage_of(found),
        model=found.model_version or "",
        request_id=found.response_id or "",
    )
    for candidate in (found.candidates or ())[:1]:
        text, thoughts = _texts(candidate)
        yield Piece(
            text=text,
            reasoning=thoughts,
            logprobs=_logprobs(candidate.logprobs_result),
            finish=_finish(candidate),
            refusal=_refusal(candidate, text),
        )
