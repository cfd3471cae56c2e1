"""The backend that a run uses when it is not given one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..backends.base import Backend
from ..errors import UsageError

__all__ = ["get_default_backend", "set_default_backend", "use_backend"]

_in_context: ContextVar[Backend | None] = ContextVar("asyncsgl_backend", default=None)
_in_process: list[Backend | None] = [None]


def set_default_backend(backend: Backend | None) -> None:
    """Use ``backend`` for every run of this process that is given none; None takes it back."""
    _in_process[0] = _checked(backend) if backend is not None else None


@contextmanager
def use_backend(backend: Backend) -> Iterator[Backend]:
    """Use ``backend`` for the runs in this ``with`` block, and in the tasks started in it."""
    token = _in_context.set(_checked(backend))
    try:
        yield backend
    finally:
        _in_context.reset(token)


def get_default_backend() -> Backend | None:
    """The backend of the context, or else of the process; None if neither is set."""
    return _in_context.get() or _in_process[0]


def choose_backend(backend: Backend | None) -> Backend:
    """``backend``, or else the default one.

    Raises:
        UsageError: there is neither.
    """
    chosen = _checked(backend) if backend is not None else get_default_backend()
    if chosen is None:
        raise UsageError(
            "no backend to run on: pass run(..., backend=...), or call "
            "asyncsgl.set_default_backend(asyncsgl.Runtime()), or use `with use_backend(...)`"
        )
    return chosen


def _checked(backend: object) -> Backend:
    if not isinstance(backend, Backend):
        raise UsageError(f"not a backend: {backend!r}")
    return backend
