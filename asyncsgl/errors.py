"""Every exception that asyncsgl raises on purpose.

::

    AsyncSGLError
    ├── UsageError                 the caller can mend it
    │   ├── ProgramError           the program misuses the language
    │   ├── InvalidArgument        a value out of range (also a ValueError)
    │   ├── UnknownVariable        no such variable (also a KeyError)
    │   ├── UnsupportedFeature     this backend cannot do it; nothing was sent
    │   ├── MissingDependency      an extra is not installed (also an ImportError)
    │   ├── BudgetExceeded         the next call could cost more than you allowed
    │   └── BatchError             a batch cannot start, or rows of it failed
    ├── OutputError                the model's output is not what was asked for
    ├── BackendError               the provider, server or engine refused or failed
    │   ├── AuthenticationError    401: the key is missing or wrong
    │   │   └── PermissionDeniedError  403: the key may not do this
    │   ├── NotFoundError          404: no such model or route
    │   ├── BadRequestError        400 and other refusals
    │   │   └── ContextLengthError the prompt does not fit
    │   ├── ContentFilterError     refused for its content
    │   ├── OverloadedError        503, 529: try again later
    │   │   └── RateLimitError     429
    │   ├── BackendTimeout         no answer in time (also a TimeoutError)
    │   └── BackendConnectionError the connection failed
    │       └── TruncatedStreamError  a stream ended without its end marker
    ├── ClosedError                used after it was closed
    └── InternalError              a bug in asyncsgl: please report it

An exception that ends a run carries the unfinished state as ``error.state``.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "AsyncSGLError",
    "AuthenticationError",
    "BackendConnectionError",
    "BackendError",
    "BackendTimeout",
    "BadRequestError",
    "BatchError",
    "BudgetExceeded",
    "ClosedError",
    "ContentFilterError",
    "ContextLengthError",
    "InternalError",
    "InvalidArgument",
    "MissingDependency",
    "NotFoundError",
    "OutputError",
    "OverloadedError",
    "PermissionDeniedError",
    "ProgramError",
    "RateLimitError",
    "TruncatedStreamError",
    "UnknownVariable",
    "UnsupportedFeature",
    "UsageError",
]


class AsyncSGLError(Exception):
    """Base of every exception raised by asyncsgl.

    Attributes:
        state: the unfinished :class:`~asyncsgl.State` of the run that this
            exception ended; ``None`` outside of a run.
    """

    state: object = None


class UsageError(AsyncSGLError):
    """The caller did something that cannot work and can mend it."""


class ProgramError(UsageError):
    """A program uses the language in a way that has no meaning."""


class InvalidArgument(UsageError, ValueError):
    """A value is of the wrong kind or out of its range.

    Args:
        field: the parameter's name.
        message: what is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self._args = (field, message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._args, self.__dict__


class UnknownVariable(UsageError, KeyError):
    """A variable was read that the program neither has nor will have.

    Args:
        name: the variable asked for.
        known: the variables there are.
    """

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(name)

    def __str__(self) -> str:
        near = get_close_matches(self.name, self.known, n=3)
        if near:
            return f"no variable {self.name!r}; did you mean {', '.join(map(repr, near))}?"
        listed = ", ".join(map(repr, self.known)) or "none"
        return f"no variable {self.name!r}; the variables here are: {listed}"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.known), self.__dict__


class UnsupportedFeature(UsageError):
    """A backend cannot do what the program asks; raised before anything is sent.

    Args:
        backend: the backend's name.
        feature: what it cannot do.
        hint: what to do instead.
    """

    def __init__(self, backend: str, feature: str, hint: str = "") -> None:
        super().__init__(f"{backend} does not support {feature}" + (f": {hint}" if hint else ""))
        self.backend = backend
        self.feature = feature
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.backend, self.feature, self.hint), self.__dict__


class MissingDependency(UsageError, ImportError):
    """An optional package is needed and not installed.

    Args:
        package: the package that could not be imported.
        extra: the extra of asyncsgl that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"the package {package!r} is needed here: pip install 'asyncsgl[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.package, self.extra), self.__dict__


class BudgetExceeded(UsageError):
    """The next call could cost more than its backend may spend; it was not sent."""


class BatchError(UsageError):
    """A batch cannot start, or rows of it failed.

    Args:
        message: what is wrong with its file, journal or settings, or which rows failed.
        results: the states and exceptions of all rows, in order, where there are any.
    """

    def __init__(self, message: str, *, results: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.results = list(results)


class OutputError(AsyncSGLError):
    """The model's output does not have the value that the program asked for."""


class BackendError(AsyncSGLError):
    """A provider, server or engine refused a request or failed at it.

    Args:
        message: what happened, in the backend's words where it has some.
        backend: the backend's name.
        request_id: the request's id, as the backend knows it.
        status: the HTTP status, where there is one.
        retry_after: seconds that the backend asks to wait, where it does.
    """

    retryable = False

    def __init__(
        self,
        message: str,
        *,
        backend: str = "",
        request_id: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        where = ", ".join(
            part
            for part in (
                backend,
                f"status {status}" if status is not None else "",
                f"request {request_id}" if request_id else "",
            )
            if part
        )
        super().__init__(f"{message} ({where})" if where else message)
        self.message = message
        self.backend = backend
        self.request_id = request_id
        self.status = status
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(cls: type[BackendError], args: tuple[object, ...]) -> BackendError:
    """A pickled error without its attributes, which pickle sets afterwards."""
    error = cls.__new__(cls)
    error.args = args
    return error


class AuthenticationError(BackendError):
    """The key is missing or wrong (401)."""


class PermissionDeniedError(AuthenticationError):
    """The key is known and not allowed to do this (403)."""


class NotFoundError(BackendError):
    """No such model or route (404)."""


class BadRequestError(BackendError):
    """The backend refused the request as it is; sending it again cannot help."""


class ContextLengthError(BadRequestError):
    """The prompt, or the prompt and the wanted output, exceed the model's context."""


class ContentFilterError(BackendError):
    """The backend refused the prompt or withheld the answer for its content."""


class OverloadedError(BackendError):
    """The backend has too much to do (503, 529)."""

    retryable = True


class RateLimitError(OverloadedError):
    """This key has used up its allowance for now (429)."""


class BackendTimeout(BackendError, TimeoutError):
    """The backend did not answer in time."""

    retryable = True


class BackendConnectionError(BackendError):
    """The connection could not be made, or broke."""

    retryable = True


class TruncatedStreamError(BackendConnectionError):
    """A stream ended without its end marker, so its text may be incomplete."""


class ClosedError(AsyncSGLError):
    """A backend, run or engine was used after it was closed."""


class InternalError(AsyncSGLError):
    """A bug in asyncsgl. Please report it."""
