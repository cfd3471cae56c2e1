"""The utilities of several backends as one: each asks all that have them."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import UnsupportedFeature
from ..types import GenRequest
from .base import Backend

__all__ = ["FanOut"]

T = TypeVar("T")


class FanOut(Backend):
    """Asks all backends behind it at once; those that cannot do it are left out.

    What one of them raises is raised when all have ended.
    """

    backends: tuple[Backend, ...]

    @property
    @abstractmethod
    def caching(self) -> Sequence[Backend]:
        """The backends at which computing a prompt ahead may save work."""

    async def get_server_info(self) -> dict[str, object]:
        """What each backend tells, in order, as ``backends``: None for one that tells nothing.

        Raises:
            UnsupportedFeature: none of them tells anything.
        """
        found = await self._all("get_server_info", lambda backend: backend.get_server_info())
        return {"backends": found}

    async def flush_cache(self, *, wait: bool = False) -> bool:
        """Empty the caches of all that have one; False if one of them was not emptied.

        Raises:
            UnsupportedFeature: none of them has one.
        """
        flushed = await self._all("flush_cache", lambda backend: backend.flush_cache(wait=wait))
        return False not in flushed

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        """Begin to record at all that can; none records if one fails.

        Returns:
            what they say, a line each.

        Raises:
            UnsupportedFeature: none of them can.
        """
        started: list[Backend] = []

        async def start(backend: Backend) -> str:
            said = await backend.start_profile(output_dir=output_dir, num_steps=num_steps)
            started.append(backend)
            return said

        try:
            return _lines(await self._all("start_profile", start))
        except Exception:
            stops = (backend.stop_profile() for backend in started)
            await asyncio.gather(*stops, return_exceptions=True)
            raise

    async def stop_profile(self) -> str:
        """End what :meth:`start_profile` began; returns and raises as it."""
        return _lines(await self._all("stop_profile", lambda backend: backend.stop_profile()))

    async def cache_prefix(self, request: GenRequest) -> None:
        """Compute a prompt ahead at each of :attr:`caching`.

        Raises:
            UnsupportedFeature: there is none.
        """
        await self._all("cache_prefix", lambda backend: backend.cache_prefix(request), self.caching)

    async def _all(
        self,
        feature: str,
        call: Callable[[Backend], Awaitable[T]],
        backends: Sequence[Backend] | None = None,
    ) -> list[T | None]:
        """The result of each backend, None for one that cannot.

        Raises:
            UnsupportedFeature: none of them can.
        """

        async def one(backend: Backend) -> T | UnsupportedFeature:
            try:
                return await call(backend)
            except UnsupportedFeature as error:
                return error

        asked = self.backends if backends is None else backends
        results = await asyncio.gather(*map(one, asked), return_exceptions=True)
        came: list[T | None] = []
        for result in results:
            if isinstance(result, UnsupportedFeature):
                came.append(None)
            elif isinstance(result, BaseException):
                raise result
            else:
                came.append(result)
        if all(isinstance(result, UnsupportedFeature) for result in results):
            raise UnsupportedFeature(self.name, feature, "none of its backends has it")
        return came


def _lines(said: Sequence[str | None]) -> str:
    return "\n".join(line for line in said if line is not None)
