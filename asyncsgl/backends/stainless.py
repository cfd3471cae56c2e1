"""What the SDKs of OpenAI and Anthropic have in common: one generator made both."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..errors import BackendConnectionError, BackendError, BackendTimeout
from .http_errors import error_of_status
from .sdk_errors import failed_to_connect, no_secrets, transport_error

__all__ = ["http_client", "sdk_error"]

_MAX_CONNECTIONS = 1000


def http_client(sdk: Any, concurrency: float, library: str = "httpx2") -> Any:
    """The SDK's HTTP client, over aiohttp where that is there, with room for all calls.

    Args:
        sdk: the SDK's module.
        concurrency: calls at once; infinity for no limit.
        library: the HTTP library that the SDK is written for.
    """
    most = _MAX_CONNECTIONS if concurrency == math.inf else max(int(concurrency), 1)
    limits = import_module(library).Limits(max_connections=most, max_keepalive_connections=most)
    try:
        return sdk.DefaultAioHttpClient(limits=limits)
    except RuntimeError:
        return sdk.DefaultAsyncHttpxClient(limits=limits)


def sdk_error(
    sdk: Any, error: Exception, backend: str, of_status: Callable[[Any, str], BackendError]
) -> BackendError | None:
    """The error of asyncsgl for one of the SDK's, or of the libraries below it.

    Args:
        sdk: the SDK's module.
        error: what was raised around it.
        backend: the backend's name.
        of_status: makes an error of a response whose status is a refusal.
    """
    if isinstance(error, sdk.APITimeoutError) and not failed_to_connect(error):
        return BackendTimeout("no answer in time", backend=backend)
    if isinstance(error, sdk.APIConnectionError):
        said = f"{error} {error.__cause__ or ''}"
        return BackendConnectionError(no_secrets(said.strip()), backend=backend)
    if isinstance(error, sdk.APIResponseValidationError):
        return BackendError(f"the answer is not as it must be: {error}", backend=backend)
    if isinstance(error, sdk.APIStatusError):
        return of_status(error, backend)
    if isinstance(error, sdk.APIError):  # an error event in a stream
        return _event_error(error, backend)
    return transport_error(error, backend)


def _event_error(error: Any, backend: str) -> BackendError:
    body = error.body if isinstance(error.body, dict) else {}
    kind = str(body.get("code") or body.get("type") or "")
    status = 429 if "rate_limit" in kind else 529 if "overloaded" in kind else 500
    return error_of_status(status, no_secrets(error.message), backend=backend)
