"""Chooses the library that does HTTP: aiohttp where it is installed, else httpx."""

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
    library = settings.library or ("httpx" if find_spec("aiohttp") is None else "aiohttp")
    await asyncio.to_thread(import_module, library)  # it takes a while
    if library == "aiohttp":
        from .http_aiohttp import connect_aiohttp

        return connect_aiohttp(settings, context)
    from .http_httpx import connect_httpx

    return connect_httpx(settings, context)
