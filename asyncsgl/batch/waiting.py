"""Waits for the end of something that must not be left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio

__all__ = ["ended"]


async def ended(future: asyncio.Future[Any]) -> None:
    """Wait until ``future`` is done, even while this task is being cancelled.

    What the future holds, also an exception, is left in it.

    Raises:
        asyncio.CancelledError: once it is done, if the wait was cancelled.
    """
    interrupted: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                interrupted = error
    if not future.cancelled():
        future.exception()  # an exception counts as seen
    if interrupted is not None:
        raise interrupted
