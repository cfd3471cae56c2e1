"""The engine as a FastAPI app."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..engine import AsyncEngine
from ..errors import EngineError
from . import batches, control, info, loads, native, openai, page
from .events import ClientLeft
from .failures import Failure, failure_of, failure_response, shape_failure
from .gate import Gate
from .routing import ERRORS, checked_text, served_by
from .service import Service
from .settings import ServerSettings

__all__ = ["create_app", "service_of"]

logger = logging.getLogger("asyncsgl_engine.server")


def create_app(engine: AsyncEngine, settings: ServerSettings | None = None) -> FastAPI:
    """An app that serves an engine, to be run or to be mounted in another app.

    The engine is started with the app, or at the first request where the app is mounted
    without its lifespan; it is not closed with it.

    Args:
        engine: started or not.
        settings: keys, limits and places.
    """
    service = Service(engine, settings or ServerSettings())
    service.answer = partial(openai.answer_batched, service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        async with service.running():
            yield

    app = FastAPI(title="asyncsgl", summary="Generate text.", lifespan=lifespan, responses=ERRORS)
    app.state.service = service
    for module in (native, openai, batches, info, loads, control, page):
        app.include_router(module.router, dependencies=[Depends(checked_text)])
    app.add_middleware(Gate, service=service)
    for kind in (Failure, EngineError, TimeoutError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientLeft, _nobody)
    app.add_exception_handler(Exception, _fault)
    return app


def service_of(app: FastAPI) -> Service:
    """The service behind an app of `create_app`."""
    service: Service = app.state.service
    return service


async def _answer(request: Request, error: Exception) -> Response:
    failure = _failure(request, error)
    served_by(request).note(failure, f"{request.method} {request.url.path}")
    response = failure_response(failure)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


async def _fault(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _answer(request, error)


async def _nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)


def _failure(request: Request, error: Exception) -> Failure:
    where = f"{request.method} {request.url.path}"
    match error:
        case RequestValidationError():
            return _badly_shaped(request, error)
        case HTTPException(status_code=404, detail="Not Found"):
            return Failure(404, f"there is no route {where}; /docs lists those that there are")
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "other methods")
            return Failure(405, f"{where}: this route takes {allowed}")
        case HTTPException():
            return Failure(error.status_code, str(error.detail))
        case _:
            return failure_of(error)


def _badly_shaped(request: Request, error: RequestValidationError) -> Failure:
    kind = request.headers.get("content-type", "none")
    if error.errors()[0]["loc"] == ("body",) and "json" not in kind:
        message = f"Content-Type: this route takes application/json, not {kind}"
        return Failure(400, message, "Content-Type")
    return shape_failure(error.errors())
