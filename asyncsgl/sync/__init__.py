"""The same API for callers that block: ``import asyncsgl.sync as sgl``.

Scripts written for SGLang's frontend run with their import changed. Programs may be plain
``def``, where ``s["x"]`` waits and gives a text, or ``async def``. Everything runs on one
event loop in a background thread, so it works in scripts, in notebooks whose own loop runs,
and from several threads at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import asyncsgl as _async

from ..program.program import Program
from .config import global_config
from .portal import PORTAL
from .program import BlockingProgram
from .stream import StreamingState

if TYPE_CHECKING:
    from asyncsgl import *  # noqa: F403

    from .runtime import Runtime as Runtime  # type: ignore[assignment]

_OWN = ("BlockingProgram", "StreamingState", "global_config")


def function(  # type: ignore[no-redef]
    body: Callable[..., Any] | Program | None = None, *, num_api_spec_tokens: int | None = None
) -> Any:
    """Make a blocking program of a function, or of a program of :func:`asyncsgl.function`.

    Args:
        body: a function whose first parameter is the program state.
        num_api_spec_tokens: see :func:`asyncsgl.function`.

    Raises:
        ProgramError: the function has no parameter for the state.
    """
    if body is None:
        return functools.partial(function, num_api_spec_tokens=num_api_spec_tokens)
    if not isinstance(body, Program):
        body = Program(body, num_api_spec_tokens=num_api_spec_tokens)
    return BlockingProgram(body, PORTAL)


def _by_kind(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


__all__ = sorted({*_async.__all__, *_OWN}, key=_by_kind)  # pyright: ignore[reportUnsupportedDunderAll]

_ON_FIRST_USE = {"Runtime": ".runtime"}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name], __name__), name)
    if name in _async.__all__:
        return getattr(_async, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
