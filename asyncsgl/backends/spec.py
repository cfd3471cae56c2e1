"""Backends from one word, for the command line and configuration files."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgument
from .base import Backend

__all__ = ["backend_from_spec"]


def backend_from_spec(spec: str, **options: Any) -> Backend:
    """Make the backend that ``spec`` names.

    Args:
        spec: ``"smollm2-135m-instruct"`` or another model for the local engine,
            ``"local:PATH"`` for a folder or file whose name looks like something else,
            ``"http://host:30000"`` for an SGLang server.
        **options: for the backend's constructor.

    Raises:
        InvalidArgument: the spec names no backend.
        MissingDependency: the backend's extra is not installed.
    """
    kind, colon, rest = spec.partition(":")
    if not spec or (colon and not rest):
        raise InvalidArgument("model", f"{spec!r} names no model")
    if kind in ("http", "https"):
        from .endpoint import RuntimeEndpoint

        return RuntimeEndpoint(spec, **options)
    if kind in _NOT_THERE:
        raise InvalidArgument("model", f"{spec!r}: {_NOT_THERE[kind]} is not there yet")
    from .runtime import Runtime

    return Runtime(rest if kind == "local" else spec, **options)


_NOT_THERE = {
    "openai": "the OpenAI backend",
    "azure": "the Azure OpenAI backend",
    "anthropic": "the Anthropic backend",
    "vertex": "the Vertex AI backend",
    "litellm": "the LiteLLM backend",
}
