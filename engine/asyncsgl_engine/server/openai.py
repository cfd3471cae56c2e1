"""OpenAI's routes: chats, completions, models, tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .chat import count_images, render
from .events import EventStream, begun, unless_left
from .failures import Failure, json_response
from .openai_answer import ChatForm, CompletionForm, Form, Stream, answer
from .openai_asks import Asked, chat_asked, completion_asked
from .openai_body import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from .routing import Deadline, Shared
from .service import Service

__all__ = ["answer_batched", "router"]

router = APIRouter(tags=["OpenAI"])

_BEHIND = -(1 << 20)
"""The priority of requests that nobody waits for."""


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request, service: Shared, asked: Deadline) -> Response:
    """Answer a conversation."""
    deadline = service.deadline(asked)
    work = chat_asked(service, body, deadline)
    wanted = await (unless_left(request.receive, work) if count_images(body.messages) else work)
    return await _respond(request, service, wanted, _chat_form(service, body), deadline)


@router.post("/v1/completions")
async def completions(
    body: CompletionBody, request: Request, service: Shared, asked: Deadline
) -> Response:
    """Continue texts."""
    wanted = await completion_asked(service, body)
    form = _completion_form(service, body, wanted)
    return await _respond(request, service, wanted, form, service.deadline(asked))


async def answer_batched(service: Service, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer to one request of a batch, which lets others go first.

    Raises:
        ValidationError: its body has the wrong shape.
        Failure: it cannot be answered.
        EngineError: the engine failed or refused it.
    """
    if body.get("stream"):
        raise Failure(400, "stream: a request of a batch cannot be streamed", "stream")
    behind = {**body, "priority": _BEHIND, "rid": None}
    if endpoint == "/v1/chat/completions":
        talk = ChatBody.model_validate(behind)
        return await _whole(
            service, await chat_asked(service, talk, None), _chat_form(service, talk), None
        )
    text = CompletionBody.model_validate(behind)
    wanted = await completion_asked(service, text)
    return await _whole(service, wanted, _completion_form(service, text, wanted), None)


def _chat_form(service: Service, body: ChatBody) -> Form:
    return ChatForm(service.text_of, service.engine.tokenizer.bytes_of, bool(body.logprobs))


def _completion_form(service: Service, body: CompletionBody, wanted: Asked) -> Form:
    return CompletionForm(service.text_of, body.logprobs is not None, len(wanted.requests))


async def _respond(
    request: Request, service: Service, wanted: Asked, form: Form, deadline: float | None
) -> Response:
    if not wanted.streams:
        work = _whole(service, wanted, form, deadline)
        return json_response(await unless_left(request.receive, work))
    events = await begun(request.receive, _chunks(service, wanted, form, deadline))
    route = f"{request.method} {request.url.path}"
    return EventStream(events, lambda error: service.failed(error, route))


async def _whole(
    service: Service, wanted: Asked, form: Form, deadline: float | None
) -> dict[str, Any]:
    done = await service.complete(wanted.requests, deadline, wanted.group)
    return answer(wanted, form, service.model_name, done)


async def _chunks(
    service: Service, wanted: Asked, form: Form, deadline: float | None
) -> AsyncGenerator[dict[str, Any], None]:
    growing = Stream(wanted, form, service.model_name)
    async with aclosing(service.stream(wanted.requests, deadline, wanted.group)) as parcels:
        async for deltas in parcels:
            for index, delta in deltas:
                for chunk in growing.chunks(index, delta):
                    yield chunk
    for chunk in growing.end():
        yield chunk


@router.get("/v1/models")
async def models(service: Shared) -> Response:
    """The model."""
    return json_response({"object": "list", "data": [_card(service)]})


@router.get("/v1/models/{model:path}")
async def model(model: str, service: Shared) -> Response:
    """The model, by its name."""
    if model not in (service.model_name, service.model_path):
        message = f"there is no model {model!r}; this server has {service.model_name!r}"
        raise Failure(404, message, "model", "model_not_found")
    return json_response(_card(service))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": "asyncsgl",
        "root": service.model_path,
        "parent": None,
        "max_model_len": service.engine.config.sequence_limit,
    }


@router.post("/tokenize", include_in_schema=False)
@router.post("/v1/tokenize")
async def tokenize(body: TokenizeBody, service: Shared) -> Response:
    """Token ids of a text, of a list of them, or of a chat as the model's template writes it."""
    ids = await _token_ids(service, body)
    counts = [len(each) for each in ids]
    one = not isinstance(body.prompt, list)
    limit = service.engine.config.sequence_limit
    return json_response(
        {
            "tokens": ids[0] if one else ids,
            "count": counts[0] if one else counts,
            "max_model_len": limit,
        }
    )


async def _token_ids(service: Service, body: TokenizeBody) -> list[list[int]]:
    prompt, messages = body.prompt, body.messages
    if messages is not None and prompt is None:
        service.check_images(count_images(messages), "messages")
        found = await render(service, messages, body)
        whole = await service.prompt(found.ids, found.images, "messages", service.deadline(None))
        return [list(whole.ids)]
    if prompt is None or messages is not None:
        raise Failure(400, "one of prompt and messages is needed", "prompt")
    encode = service.engine.tokenizer.encode
    special = None if body.add_special_tokens else False
    texts = [prompt] if isinstance(prompt, str) else prompt
    return await service.off_loop(
        sum(map(len, texts)), lambda: [list(encode(text, special)) for text in texts]
    )


@router.post("/detokenize", include_in_schema=False)
@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeBody, service: Shared) -> Response:
    """The text of token ids, or of a list of them."""
    tokens = body.tokens
    nested: list[Sequence[int]] = [each for each in tokens if isinstance(each, list)]
    lists = nested or [[each for each in tokens if isinstance(each, int)]]
    vocabulary = service.engine.config.model.vocab_size
    for each in lists:
        for token in each:
            if not 0 <= token < vocabulary:
                message = f"tokens: token id {token} is not in [0, {vocabulary - 1}]"
                raise Failure(400, message, "tokens")
    decode = service.engine.tokenizer.decode
    texts = await service.off_loop(
        sum(map(len, lists)), lambda: [decode(each, body.skip_special_tokens) for each in lists]
    )
    return json_response({"text": texts if nested else texts[0]})
