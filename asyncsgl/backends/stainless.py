"""What the SDKs of OpenAI and Anthropic have in common: one generator made both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from ..errors import BackendConnectionError, BackendError, BackendTimeout, InvalidArgument
from .http_errors import error_of_status
from .sdk_errors import failed_to_connect, no_secrets, transport_error
from .settings import Settings

__all__ = ["as_it_is", "make_client", "sdk_error"]

_CALL_OPTIONS = ("extra_headers", "extra_query", "extra_body", "timeout")


def as_it_is(body: Mapping[str, Any], **required: Any) -> dict[str, Any]:
    """Arguments for a ``create`` that sends ``body`` as it is.

    The SDK looks at each of its own parameters by the type that it is declared with, which is
    a quarter of a short call's time; what is in ``extra_body`` it takes over.

    Args:
        body: what to send; may also have the options of single calls that the SDK takes.
        **required: the parameters that ``create`` does not go without; the body's win.
    """
    options = {name: body[name] for name in _CALL_OPTIONS if name in body}
    more = options.pop("extra_body", None) or {}
    sent = {name: value for name, value in body.items() if name not in _CALL_OPTIONS}
    return {**required, **options, "extra_body": {**sent, **more}}


def make_client(sdk_name: str, kind: str, arguments: Mapping[str, Any], settings: Settings) -> Any:
    """A client of the SDK; importing it takes long, so call this in a thread.

    Its own retries are off, and it has a connection for each call that may be under way.

    Args:
        sdk_name: the module.
        kind: the client's class.
        arguments: for it; those that are None are left out.
        settings: the backend's.

    Raises:
        InvalidArgument: the class does not take one of the arguments.
    """
    sdk = import_module(sdk_name)
    given = {name: value for name, value in arguments.items() if value is not None}
    if "http_client" not in given:
        given["http_client"] = _http_client(sdk, settings.connections)
    try:
        return getattr(sdk, kind)(timeout=settings.timeout, max_retries=0, **given)
    except (TypeError, ValueError, _base_error(sdk)) as error:
        raise InvalidArgument("client_args", no_secrets(str(error))) from error


def _http_client(sdk: Any, connections: int) -> Any:
    """The SDK's HTTP client, over aiohttp where that is there."""
    library = "httpx" if sdk.__version__.startswith("2.") and sdk.__name__ == "openai" else "httpx2"
    limits = import_module(library).Limits(
        max_connections=connections, max_keepalive_connections=connections
    )
    try:
        return sdk.DefaultAioHttpClient(limits=limits)
    except RuntimeError:
        return sdk.DefaultAsyncHttpxClient(limits=limits)


def _base_error(sdk: Any) -> type[Exception]:
    found: type[Exception] = getattr(sdk, "OpenAIError", None) or sdk.AnthropicError
    return found


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
