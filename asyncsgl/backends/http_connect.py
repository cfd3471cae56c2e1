"""Chooses the library that does HTTP."""

from __future__ import annotations

import asyncio
from importlib import import_module
from importlib.util import find_spec

from .http import HTTPClient, HTTPSettings

__all__ = ["connect"]


async def connect(settings: HTTPSettings) -> HTTPClient:
    """A client for the running event loop. Nothing is sent yet.

    Raises:
        InvalidArgument: the CA file cannot be read.
    """
    context = await asyncio.to_thread(settings.ssl_context) if settings.secure else None
    library = settings.library or _best(settings)
    await asyncio.to_thread(import_module, library)  # it takes a while
    if library == "httptools":
        from .http_tools import connect_httptools

        return connect_httptools(settings, context)
    if library == "aiohttp":
        from .http_aiohttp import connect_aiohttp

        return connect_aiohttp(settings, context)
    from .http_httpx import connect_httpx

    return connect_httpx(settings, context)


def _best(settings: HTTPSettings) -> str:
    """The quickest library that is installed and reaches the server."""
    if settings.proxy is None and find_spec("httptools") and find_spec("aiohappyeyeballs"):
        return "httptools"
    return "aiohttp" if find_spec("aiohttp") else "httpx"
