"""Clients that belong to the event loop they were made on."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..errors import ClosedError

__all__ = ["PerLoop"]

C = TypeVar("C")

# A client in use must not be garbage, also where its backend is: a backend that is dropped
# is collected together with all that only it holds, and the client would be found unclosed.
_in_use: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, object]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(slots=True)
class _Held(Generic[C]):
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    life: AsyncGenerator[C, None] | None = None
    client: C | None = None


class PerLoop(Generic[C]):
    """One client for each event loop, made at its first use there.

    A loop that ends by ``asyncio.run`` closes its client: the client lives in an
    asynchronous generator, and ending loops close theirs.

    Args:
        make: makes a client, on the loop that will use it.
        close: closes one, on its loop.
    """

    def __init__(
        self, make: Callable[[], Awaitable[C]], close: Callable[[C], Awaitable[None]]
    ) -> None:
        self._make = make
        self._close = close
        self._held: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Held[C]] = (
            weakref.WeakKeyDictionary()
        )
        self._closed = False

    async def get(self) -> C:
        """The client of the running loop.

        Raises:
            ClosedError: after :meth:`aclose`.
        """
        if self._closed:
            raise ClosedError("this backend is closed: make a new one")
        loop = asyncio.get_running_loop()
        held = self._held.get(loop)
        if held is None:
            held = self._held[loop] = _Held()
        if held.client is None:
            async with held.lock:
                if held.client is None:
                    held.life = _life(self._make, self._close, weakref.ref(self._held))
                    held.client = await anext(held.life)
        return held.client

    async def aclose(self) -> None:
        """Close all clients, each on its loop; closing twice is fine."""
        self._closed = True
        here = asyncio.get_running_loop()
        for loop, held in list(self._held.items()):
            life = held.life
            if life is None or loop.is_closed():
                continue
            if loop is here:
                await life.aclose()
            elif loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(_closed(life), loop)
                await asyncio.wrap_future(closing)
        self._held.clear()


async def _life(
    make: Callable[[], Awaitable[C]],
    close: Callable[[C], Awaitable[None]],
    registry: weakref.ref[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Held[C]]],
) -> AsyncGenerator[C, None]:
    """The life of one client. It holds nothing else, so that it ends with its backend, too."""
    loop = asyncio.get_running_loop()
    client = await make()
    del make
    in_use = _in_use.setdefault(loop, {})
    in_use[id(client)] = client
    try:
        yield client
    finally:
        held = registry()
        if held is not None:
            held.pop(loop, None)
        try:
            await close(client)
        finally:
            del in_use[id(client)]


async def _closed(life: AsyncGenerator[C, None]) -> None:
    await life.aclose()
