"""What the routes have in common: how they get the service and what may go wrong."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from fastapi import Depends, Header
from pydantic import BaseModel
from starlette.requests import Request

from .failures import Failure
from .service import Service

__all__ = ["ERRORS", "Deadline", "Shared", "checked_text", "served_by"]


class ErrorBody(BaseModel):
    """An error, flat as SGLang sends it and nested as OpenAI does."""

    object: str
    message: str
    type: str
    param: str | None
    code: int
    error: dict[str, Any]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request cannot be answered as it is",
        401: "a key is asked for",
        404: "there is no such thing",
        408: "the body did not come in time",
        413: "the body is too large",
        422: "not used: a body of the wrong shape is answered with 400",
        500: "a fault of the server",
        503: "too many requests, or not ready; Retry-After says when to come back",
        504: "the deadline passed",
    }.items()
    if status != 422
}

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def served_by(request: Request) -> Service:
    """The service of the app that a request came to."""
    service: Service = request.app.state.service
    return service


async def checked_text(request: Request) -> None:
    """Refuse a JSON body with half a surrogate pair in it, which is no text.

    Raises:
        Failure: there is one.
    """
    if request.headers.get("content-type", "").startswith("multipart/"):
        return
    body = await request.body()
    if _SURROGATE.search(body) is None:
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Failure(400, "a text holds half a surrogate pair, which is no Unicode") from error
    except ValueError:
        return


async def _started(request: Request) -> Service:
    service = served_by(request)
    await service.start()
    return service


async def _deadline(  # a coroutine, for FastAPI sends plain functions to a thread
    x_request_timeout: Annotated[
        float | None, Header(gt=0, le=86400, description="seconds this request may take")
    ] = None,
) -> float | None:
    return x_request_timeout


Shared = Annotated[Service, Depends(_started)]
Deadline = Annotated[float | None, Depends(_deadline)]
