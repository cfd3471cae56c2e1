"""The engine behind HTTP: SGLang's routes and OpenAI's. Needs the extra `serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .settings import Address, ServerSettings

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["Address", "ServerSettings", "create_app"]


def __getattr__(name: str) -> object:
    """Import the app, and FastAPI with it, when it is first asked for."""
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .app import create_app

    return create_app
