"""SGLang's own route for generating: `/generate`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .events import EventStream, begun, unless_left
from .failures import json_response
from .native_answer import Growing, TextOf, result
from .native_asks import Asks, asks_of, token_ids_of
from .native_body import GenerateBody
from .native_images import image_sources
from .routing import Deadline, Shared
from .service import Service

__all__ = ["router"]

router = APIRouter(tags=["native"], strict_content_type=False)


@router.put("/generate", include_in_schema=False)
@router.post("/generate")
async def generate(
    body: GenerateBody, request: Request, service: Shared, asked: Deadline
) -> Response:
    """Continue a text, or a list of them."""
    deadline = service.deadline(asked)
    work = _asks(service, body, deadline)
    asks = await (unless_left(request.receive, work) if body.image_data else work)
    group = body.rid if isinstance(body.rid, str) else None
    text_of = service.text_of if body.return_text_in_logprobs else None
    requests = [ask.request for ask in asks.asks]
    if body.stream:
        events = _chunks(service, asks, deadline, group, text_of)
        route = f"{request.method} /generate"
        return EventStream(
            await begun(request.receive, events), lambda error: service.failed(error, route)
        )
    done = await unless_left(request.receive, service.complete(requests, deadline, group))
    results = [result(ask, each, text_of) for ask, each in zip(asks.asks, done, strict=True)]
    return json_response(results if asks.is_list else results[0])


async def _asks(service: Service, body: GenerateBody, deadline: float | None) -> Asks:
    text = body.text or ""
    characters = len(text) if isinstance(text, str) else sum(map(len, text))
    tokens = sum(1 if isinstance(each, int) else len(each) for each in body.input_ids or ())
    encode = service.engine.tokenizer.encode
    limit = service.engine.config.context_length
    given, is_list = await service.off_loop(characters + tokens, lambda: token_ids_of(body, encode))
    sources = image_sources(body.image_data, len(given), is_list)
    prompts = [
        await service.prompt(ids, images, "image_data", deadline)
        for ids, images in zip(given, sources, strict=True)
    ]
    return asks_of(body, prompts, is_list, limit)


async def _chunks(
    service: Service,
    asks: Asks,
    deadline: float | None,
    group: str | None,
    text_of: TextOf | None,
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks of all answers as they grow; in a list, each says which it belongs to."""
    incremental = service.settings.incremental_streaming_output
    growing = [Growing(ask, text_of, incremental) for ask in asks.asks]
    requests = [ask.request for ask in asks.asks]
    async with aclosing(service.stream(requests, deadline, group)) as parcels:
        async for deltas in parcels:
            for index, delta in deltas:
                answer = growing[index]
                answer.add(delta)
                if answer.due:
                    chunk = answer.chunk()
                    yield {**chunk, "index": index} if asks.is_list else chunk
