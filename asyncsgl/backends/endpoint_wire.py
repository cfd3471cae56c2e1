"""Requests of programs in SGLang's native form, and its answers as ours."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import BackendError
from ..types import (
    Completion,
    FinishReason,
    Generation,
    GenRequest,
    Media,
    SamplingParams,
    Timings,
    TokenLogprob,
    Usage,
)
from .http_errors import error_of_status, message_of

__all__ = [
    "Json",
    "abortable",
    "encoded",
    "finish_of",
    "generate_body",
    "generation_of",
    "refusal_of",
    "results_of",
    "shown_text",
    "usage_of",
    "wants_logprobs",
    "with_rids",
]

Json: TypeAlias = dict[str, Any]
"""An object of the wire, not yet looked at."""

_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "stop_regex": "stop_regex",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "ignore_eos": "ignore_eos",
    "logit_bias": "logit_bias",
    "seed": "sampling_seed",
}
"""Our sampling fields as keys of ``sampling_params``; the server refuses any other key."""

_NOTHING = Usage()
_INLINE_BYTES = 2**18
"""Media up to this size are encoded on the event loop: that takes less than a thread."""


# -- what is asked ----------------------------------------------------------------------------


def generate_body(request: GenRequest, text: str, rid: str, *, stream: bool) -> Json:
    """The body of ``POST /generate``.

    Args:
        request: the program's request.
        text: its prompt.
        rid: the id to abort it by.
        stream: whether the answer is wanted as it comes.
    """
    params = request.sampling
    count = params.n or 1
    sampling = _sampling(request)
    body: Json
    if count > 1 and params.seed is not None:
        # one seed would give the same answer n times
        seeds = [{**sampling, "sampling_seed": params.seed + index} for index in range(count)]
        body = {"text": [text] * count, "sampling_params": seeds}
    elif count > 1:
        # the server gives each answer an id of its own
        body = {"text": text, "sampling_params": {**sampling, "n": count}}
    else:
        body = {"text": text, "sampling_params": sampling, "rid": rid}
    if stream:
        body["stream"] = True
    if wants_logprobs(params):
        body["return_logprob"] = True
        _set(body, "logprob_start_len", params.logprob_start_len)
        _set(body, "top_logprobs_num", params.top_logprobs_num)
        _set(body, "return_text_in_logprobs", params.return_text_in_logprobs)
    return body


def abortable(body: Json) -> str | None:
    """What to abort the request by: its id, or what its ids begin with; None if it has none."""
    rid = body.get("rid")
    return rid[0][:32] if isinstance(rid, list) else rid


def with_rids(body: Json) -> Json:
    """The body with ids of our own, that begin alike where there are several prompts."""
    rid = os.urandom(16).hex()
    prompts = body.get("text", body.get("input_ids"))
    if isinstance(prompts, str):
        return {**body, "rid": rid}
    assert prompts is not None
    return {**body, "rid": [f"{rid}{index:08x}" for index in range(len(prompts))]}


def wants_logprobs(params: SamplingParams) -> bool:
    """Whether any logprobs are asked for."""
    return bool(params.return_logprob or params.top_logprobs_num or _wants_prompt(params))


def _wants_prompt(params: SamplingParams) -> bool:
    return params.logprob_start_len is not None and params.logprob_start_len >= 0


def _set(body: Json, key: str, value: object) -> None:
    if value is not None:
        body[key] = value


def _sampling(request: GenRequest) -> Json:
    params = request.sampling
    values = {_NAMES[name]: getattr(params, name) for name in params.given() if name in _NAMES}
    if params.logit_bias is not None:
        values["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if request.constraint is not None:
        values[request.constraint.kind] = request.constraint.source
    return values


async def encoded(body: Json, request: GenRequest) -> bytes:
    """The body as JSON, with the request's images in their order."""
    media = [
        part for message in request.messages for part in message.parts if type(part) is not str
    ]
    if not media:
        return json.dumps(body).encode()
    if sum(len(part.data or b"") for part in media if isinstance(part, Media)) <= _INLINE_BYTES:
        return _with_images(body, media)
    return await asyncio.to_thread(_with_images, body, media)


def _with_images(body: Json, media: Sequence[object]) -> bytes:
    images = [_address(part) for part in media if isinstance(part, Media)]
    match body.get("text"):
        case str() as text if body["sampling_params"].get("n", 1) > 1:
            # several answers to one prompt are a batch to the server, with an entry a prompt
            body = {**body, "text": [text], "image_data": [images]}
        case str():
            body = {**body, "image_data": images}
        case [*texts]:
            body = {**body, "image_data": [images] * len(texts)}
    return json.dumps(body).encode()


def _address(media: Media) -> str:
    if media.data is None:
        assert media.url is not None, "an image has bytes or an address"
        return media.url
    return f"data:{media.media_type};base64,{base64.b64encode(media.data).decode()}"


# -- what is answered -------------------------------------------------------------------------


def results_of(body: bytes, count: int, *, backend: str, request_id: str | None) -> list[Json]:
    """The ``count`` results of an answer of status 200.

    Raises:
        BackendError: it is an error in another guise, or not a result at all.
    """
    try:
        found = json.loads(body.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        shown = body[:200].decode("utf-8", "replace")
        raise BackendError(
            f"the server's answer is not JSON: {shown!r}", backend=backend, request_id=request_id
        ) from error
    results = found if isinstance(found, list) else [found]
    for result in results:
        refused = refusal_of(result, backend=backend, request_id=request_id)
        if refused is not None:
            raise refused
    if len(results) != count:
        raise BackendError(
            f"the server gave {len(results)} results for {count}",
            backend=backend,
            request_id=request_id,
        )
    return results


def refusal_of(result: Any, *, backend: str, request_id: str | None) -> BackendError | None:
    """The error that ``result`` tells of; None if it is a result.

    A request that was aborted is one, though its status is 200 and it may have text.
    """
    match result:
        case {"meta_info": {"finish_reason": {"type": "abort", **rest}}}:
            message = rest.get("message")
            code = rest.get("status_code")
            return error_of_status(
                code if isinstance(code, int) else None,
                f"the server aborted the request: {message or 'it does not say why'}",
                backend=backend,
                request_id=request_id,
            )
        case {"text": str(), "meta_info": {}}:
            return None
    message, status = message_of(result)
    return error_of_status(
        status,
        message or f"the server's answer has no text: {json.dumps(result)[:200]}",
        backend=backend,
        request_id=request_id,
    )


def generation_of(
    request: GenRequest,
    results: Sequence[Json],
    *,
    rid: str,
    model: str,
    total: float,
    first_token: float | None = None,
    emulated: tuple[str, ...] = (),
) -> Generation:
    """The results of one request together.

    Args:
        request: what was asked.
        results: one for each answer.
        rid: the id that the server knows it by.
        model: the model's name, where it is known.
        total: seconds from the hand-over to the end.
        first_token: seconds to the first text.
        emulated: what the server does not do as it is asked, in words.
    """
    metas = [result["meta_info"] for result in results]
    queued = [meta["queue_time"] for meta in metas if meta.get("queue_time") is not None]
    return Generation(
        tuple(_completion(request.sampling, result) for result in results),
        usage_of(metas),
        rid,
        model,
        Timings(total, first_token, min(queued) if queued else None),
        emulated,
    )


def usage_of(metas: Sequence[Json]) -> Usage:
    """The tokens of one request; its prompt counts once."""
    usage = _NOTHING
    for meta in metas:
        cached = _number(meta, "cached_tokens")
        usage = Usage(
            _number(metas[0], "prompt_tokens"),
            usage.completion_tokens + _number(meta, "completion_tokens"),
            min(cached, usage.cached_tokens) if usage.requests else cached,
            usage.reasoning_tokens + _number(meta, "reasoning_tokens"),
            requests=1,
        )
    return usage


def _number(meta: Json, key: str) -> int:
    value = meta.get(key)
    return int(value) if value is not None else 0


def _completion(params: SamplingParams, result: Json) -> Completion:
    meta = result["meta_info"]
    reason, matched = finish_of(meta.get("finish_reason"))
    tokens = _number(meta, "completion_tokens")
    logprobs = prompt = None
    if params.return_logprob or params.top_logprobs_num:
        # a prompt that is only computed comes with one logprob too many
        logprobs = token_logprobs(meta, "output")[:tokens]
    if _wants_prompt(params):
        prompt = token_logprobs(meta, "input")
    return Completion(
        shown_text(params, result),
        reason,
        matched,
        tuple(result.get("output_ids") or ())[:tokens],
        logprobs,
        prompt or None,
        completion_tokens=tokens,
    )


def shown_text(params: SamplingParams, result: Json) -> str:
    """The text of a result, up to the match of the pattern that ended it."""
    text: str = result["text"]
    _, matched = finish_of(result["meta_info"].get("finish_reason"))
    if not isinstance(matched, str) or matched not in (params.stop_regex or ()):
        return text
    found = re.search(matched, text)
    return text if found is None else text[: found.start()]


def finish_of(finish: Any) -> tuple[FinishReason, str | int | None]:
    """Why a text ended, and the stop that it met."""
    match finish:
        case {"type": "length"} | "length":
            return "length", None
        case {"matched": [*_, int(last)]}:
            return "stop", last
        case {"matched": int() | str() as matched}:
            return "stop", matched
        case _:
            return "stop", None


def token_logprobs(meta: Mapping[str, Any], side: str, start: int = 0) -> tuple[TokenLogprob, ...]:
    """The logprobs of the ``"input"`` or the ``"output"`` from the entry ``start`` on."""
    entries: list[Any] = meta.get(f"{side}_token_logprobs") or []
    tops: list[Any] = meta.get(f"{side}_top_logprobs") or []
    return tuple(
        TokenLogprob(
            token,
            logprob,
            text,
            tuple(
                (other, value, shown)
                for value, other, shown in (tops[index] if index < len(tops) else None) or ()
            ),
        )
        for index, (logprob, token, text) in enumerate(entries)
        if index >= start
    )
