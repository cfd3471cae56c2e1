"""Errors that escape the SDKs' own classes: of their HTTP libraries, of time, of bad bodies."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

from ..errors import BackendConnectionError, BackendError, BackendTimeout

__all__ = ["failed_to_connect", "hide", "no_secrets", "timed_out", "transport_error"]

_SHOWN = 1000
_SECRET = re.compile(
    r"""
    (?<![\w-]) (?:
        (?: sk | pk | rk | gsk | xai | pplx | hf | csk | tgp | nvapi ) [-_] [\w-]{8,}
      | AIza [\w-]{8,}
      | ya29\. [\w.-]{8,}
      | eyJ [\w-]{8,} (?: \. [\w-]+ )*
      | [0-9A-Fa-f]{32,}
      | [A-Za-z0-9]{80,}
    )
    | (?<= Bearer\ ) [^\s'",]+
    | (?<= [?&]key= ) [^\s&'"]+
    """,
    re.VERBOSE,
)
"""Keys as providers make them, hexadecimal and long ones as Azure's, and what stands for one."""


def transport_error(error: Exception, backend: str) -> BackendError | None:
    """The error for one that an HTTP library raised below the SDK; None if it is no such one.

    The libraries are looked up among the loaded modules, as which of them an SDK uses
    differs by its version.
    """
    said = no_secrets(str(error) or type(error).__name__)
    if failed_to_connect(error):
        return BackendConnectionError(f"the connection failed: {said}", backend=backend)
    if isinstance(error, TimeoutError) or _is(error, "TimeoutException", "httpx", "httpx2"):
        return BackendTimeout(f"no answer in time: {said}", backend=backend)
    if (
        isinstance(error, OSError)
        or _is(error, "HTTPError", "httpx", "httpx2")
        or _is(error, "ClientError", "aiohttp")
    ):
        return BackendConnectionError(f"the connection failed: {said}", backend=backend)
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return BackendError(f"the answer is not JSON: {said}", backend=backend)
    return None


def failed_to_connect(error: BaseException | None) -> bool:
    """Whether there is a lost or refused connection below ``error``.

    The aiohttp transports of the SDKs call every connection error a timeout of connecting.
    """
    lost = [cause for cause in _chain(error) if _is(cause, "ClientConnectionError", "aiohttp")]
    return bool(lost) and not isinstance(lost[0], TimeoutError)


def timed_out(error: BaseException) -> bool:
    """Whether there is a timeout below ``error``."""
    return any(
        isinstance(cause, TimeoutError) or _is(cause, "TimeoutException", "httpx", "httpx2")
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is(error: BaseException, name: str, *modules: str) -> bool:
    loaded = (getattr(sys.modules.get(module), name, None) for module in modules)
    return any(isinstance(kind, type) and isinstance(error, kind) for kind in loaded)


def no_secrets(text: str) -> str:
    """``text``, shortened, without what looks like a key, a token or a password."""
    shown = _SECRET.sub("***", text[:_SHOWN])
    return shown + ("…" if len(text) > _SHOWN else "")


def hide(secret: str, error: BackendError) -> None:
    """Take ``secret`` out of what ``error`` says: services like to repeat a key that is wrong."""
    if secret in str(error):
        error.args = (str(error).replace(secret, "***"),)
        error.message = error.message.replace(secret, "***")
