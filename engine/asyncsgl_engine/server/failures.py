"""What went wrong, as a status and a body that SGLang's and OpenAI's clients both read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from ..errors import (
    Closed,
    ConfigError,
    EngineError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
)
from .native_body import SamplingBody

__all__ = ["Failure", "dumps", "failure_of", "failure_response", "json_response", "shape_failure"]

RETRY_AFTER_S = 1
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "DeadlineExceededError",
}


class Failure(Exception):
    """Raised by a route to answer with an error.

    Args:
        status: the HTTP status.
        message: what happened, where, and what to do.
        param: the request's field at fault.
        code: a word for programs, such as `model_not_found`; by default the status.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        """The kind of error, by its status."""
        return _TYPES.get(self.status, HTTPStatus(self.status).phrase.replace(" ", ""))

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (408, 429, 503)

    def body(self) -> dict[str, Any]:
        """The error twice: flat, as SGLang's clients read it, and nested, as OpenAI's do."""
        flat = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.status,
        }
        nested = {**flat, "code": self.code or self.status, "retryable": self.retryable}
        return {"object": "error", **flat, "error": nested}


def failure_of(error: Exception) -> Failure:
    """The answer to an exception."""
    match error:
        case Failure():
            return error
        case PromptTooLong():
            message = (
                f"The input ({error.prompt_tokens} tokens) is longer than the model's context "
                f"length allows: at most {error.limit} tokens fit ({error.reason}); shorten it or "
                "raise that limit."
            )
            return Failure(400, message, "prompt", "context_length_exceeded")
        case InvalidRequest():
            return Failure(400, str(error), error.field)
        case ConfigError():
            return Failure(400, str(error))
        case Overloaded():
            return Failure(503, f"The request queue is full: {error}")
        case Closed():
            return Failure(503, f"The server is shutting down: {error}")
        case EngineError():
            return Failure(500, str(error))
        case TimeoutError():
            return Failure(504, "the request's deadline passed")
        case _:
            return Failure(500, f"internal error: {type(error).__name__}: {error}")


def failure_response(failure: Failure) -> Response:
    """The response for a failure; one that may pass tells when to try again."""
    response = json_response(failure.body(), failure.status)
    if failure.retryable:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    if failure.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def json_response(body: object, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(dumps(body), status, media_type="application/json")


def dumps(body: object) -> bytes:
    """Compact JSON; half a surrogate pair, which UTF-8 cannot hold, becomes a JSON escape."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        errors="backslashreplace"
    )


_NO_NAMES = frozenset(("body", "query", "header", "path", "str", "int", "float", "bool"))


def _is_name(part: str) -> bool:
    """Whether a part of a location is a field's name, and not one of the types it may have."""
    return part not in _NO_NAMES and part.replace("_", "").replace("-", "").islower()


def shape_failure(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """The answer to a body of the wrong shape.

    Args:
        errors: pydantic's; the first one is told.
    """
    first = errors[0]
    names = [str(part) for part in first["loc"] if isinstance(part, int) or _is_name(part)]
    where = ".".join(names)
    if first["type"] == "extra_forbidden":
        accepted = ", ".join(sorted(SamplingBody.model_fields))
        known = f"; accepted are {accepted}" if "sampling_params" in names else ""
        return Failure(400, f"{where}: there is no such parameter{known}", where)
    return Failure(400, f"{where or 'body'}: {first['msg']}", where or None)
