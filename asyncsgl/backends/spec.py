"""Backends from one word, for the command line and configuration files."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..errors import InvalidArgument
from .base import Backend

__all__ = ["backend_from_spec"]


def backend_from_spec(spec: str, **options: Any) -> Backend:
    """Make the backend that ``spec`` names.

    Args:
        spec: ``"smollm2-135m-instruct"`` or another model for the local engine,
            ``"local:PATH"`` for a folder or file whose name looks like something else,
            ``"http://host:30000"`` for an SGLang server, and ``"openai:MODEL"``,
            ``"azure:DEPLOYMENT"``, ``"anthropic:MODEL"``, ``"vertex:MODEL"`` and
            ``"litellm:PROVIDER/MODEL"`` for those providers, with the key in the environment.
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
    if kind in _PROVIDERS:
        module, name, fixed = _PROVIDERS[kind]
        provider: Callable[..., Backend] = getattr(import_module(module, __package__), name)
        return provider(rest, **{**fixed, **options})
    from .runtime import Runtime

    return Runtime(rest if kind == "local" else spec, **options)


_PROVIDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "openai": (".openai", "OpenAI", {}),
    "azure": (".openai", "OpenAI", {"is_azure": True}),
    "anthropic": (".anthropic", "Anthropic", {}),
    "vertex": (".vertex", "VertexAI", {}),
    "litellm": (".litellm", "LiteLLM", {}),
}
