"""What every request passes first: keys, the drain, the number of requests, the body's size."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import Failure, failure_response
from .service import Service

__all__ = ["Gate"]

GENERATING = frozenset(
    ("/generate", "/health_generate", "/v1/completions", "/v1/chat/completions", "/encode")
)
_ANY_TYPE = frozenset(
    ("/generate", "/abort_request", "/flush_cache", "/start_profile", "/stop_profile")
)
"""SGLang's own routes, which do not insist on a content type: curl sends another one."""
_OPEN_WHILE_DRAINING = ("/health", "/ready", "/metrics", "/abort_request")


class Gate:
    """ASGI middleware: refuses, before a body is read, what cannot be answered.

    Args:
        app: behind the gate.
        service: knows the limits.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = _path(scope)
        try:
            self._check(scope, path)
            body = _Body(receive, self._body_limit(path), self._service.settings.body_timeout)
            if path in _ANY_TYPE:
                scope = {**scope, "headers": _untyped(scope["headers"])}
            if path in GENERATING:
                with self._service.inside():
                    await self._app(scope, body, send)
            else:
                await self._app(scope, body, send)
        except Failure as failure:
            self._service.note(failure, f"{scope['method']} {path}")
            await failure_response(failure)(scope, receive, send)

    def _check(self, scope: Scope, path: str) -> None:
        headers = Headers(scope=scope)
        refusal = self._service.keys.refusal(scope["method"], path, headers.get("authorization"))
        if refusal is not None:
            raise refusal
        if self._service.starting and not path.startswith(_OPEN_WHILE_DRAINING):
            raise Failure(503, "The model is being loaded.")
        if self._service.draining and not path.startswith(_OPEN_WHILE_DRAINING):
            raise Failure(503, "The server is shutting down.")
        length = headers.get("content-length", "0")
        limit = self._body_limit(path)
        if not length.isdecimal() or int(length) > limit:
            raise _too_large(limit)

    def _body_limit(self, path: str) -> int:
        settings = self._service.settings
        return settings.max_uploads if path == "/v1/files" else settings.max_request_body


class _Body:
    """Receives a body of bounded size in bounded time."""

    __slots__ = ("_deadline", "_left", "_limit", "_receive", "_whole")

    def __init__(self, receive: Receive, limit: int, timeout: float) -> None:
        self._receive = receive
        self._limit = self._left = limit
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, "the request's body did not come in time") from error
        self._whole = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            failure = _too_large(self._limit)
            raise HTTPException(failure.status, failure.message)
        return message


def _untyped(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers that do not say what the body is, so that it is read as JSON."""
    return [(name, value) for name, value in headers if name != b"content-type"]


def _too_large(limit: int) -> Failure:
    return Failure(413, f"the request's body is larger than {limit} bytes (max_request_body)")


def _path(scope: Scope) -> str:
    """The path below the place where the app is mounted."""
    path: str = scope["path"]
    root = scope.get("root_path", "")
    if root and path.startswith(root):
        path = path[len(root) :]
    return path or "/"
