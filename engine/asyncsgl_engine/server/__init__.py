"""The engine behind HTTP: SGLang's routes and OpenAI's. Needs the extra `serve`."""

from __future__ import annotations

from .app import create_app
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
