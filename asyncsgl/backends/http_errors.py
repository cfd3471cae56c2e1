"""From a status and a body, in any of the forms that servers use, to one of our errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from ..errors import (
    AuthenticationError,
    BackendError,
    BackendTimeout,
    BadRequestError,
    ContextLengthError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitError,
)
from .retry import retry_after

__all__ = ["error_of_body", "error_of_status", "message_of"]

_KINDS: Mapping[int, type[BackendError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: BackendTimeout,
    429: RateLimitError,
    503: OverloadedError,
    504: BackendTimeout,
    529: OverloadedError,
}
_PASSING = frozenset({409, 425})
"""Refusals of a request that comes at a bad time: a conflict with another, or too early."""
_TOO_LONG = ("context length", "context window", "maximum context", "max_req_input_len")
_SHOWN = 500


def error_of_status(
    status: int | None,
    message: str,
    *,
    backend: str = "",
    request_id: str | None = None,
    seconds: float | None = None,
) -> BackendError:
    """The error for ``status``.

    Args:
        status: of the answer, or what stands for it in an answer of status 200.
        message: the server's words.
        backend: the backend's name.
        request_id: the request's id.
        seconds: to wait, where the server asks for it.
    """
    kind = _KINDS.get(status or 0, BackendError)
    refused = status is not None and 400 <= status < 500 and status not in _PASSING
    if kind is BackendError and refused:
        kind = BadRequestError
    if kind is BadRequestError and any(words in message.lower() for words in _TOO_LONG):
        kind = ContextLengthError
    return kind(message, backend=backend, request_id=request_id, status=status, retry_after=seconds)


def error_of_body(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    backend: str = "",
    request_id: str | None = None,
) -> BackendError:
    """The error for an answer whose status is not 200."""
    try:
        found = message_of(json.loads(body))
    except ValueError:
        found = body.decode("utf-8", "replace").strip(), None
    message = found[0] or _phrase(status)
    if len(message) > _SHOWN:
        message = message[:_SHOWN] + "…"
    return error_of_status(
        status,
        message,
        backend=backend,
        request_id=request_id,
        seconds=retry_after(headers),
    )


def message_of(body: Any) -> tuple[str, int | None]:
    """The words of an error's JSON, and the status that it names; no words if it is none.

    Known are ``{"error": "…"}``, ``{"error": {"message": …}}``, the flat form with
    ``"object": "error"``, and ``{"detail": …}``.
    """
    match body:
        case {"error": str(message)}:
            return message or "an error without words", None
        case {"error": {"message": str(message), **rest}}:
            return message, _code(rest)
        case {"object": "error", "message": str(message), **rest}:
            return message, _code(rest)
        case {"error": said} if said:
            return json.dumps(said), _code(said)
        case {"detail": said}:
            return said if isinstance(said, str) else json.dumps(said), None
        case _:
            return "", None


def _code(fields: Any) -> int | None:
    code = fields.get("code") if isinstance(fields, dict) else None
    if isinstance(code, str) and code.isdecimal():
        code = int(code)
    return code if isinstance(code, int) and 100 <= code < 600 else None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"status {status}"
