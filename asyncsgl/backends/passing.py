"""Backends around another one: what they pass on unchanged."""

from __future__ import annotations

from collections.abc import Mapping

from ..lang.chat_template import ChatTemplate
from ..types import GenRequest
from .base import Backend, Capabilities

__all__ = ["PassingBackend"]


class PassingBackend(Backend):
    """Passes on all but the calls; what the backend behind it raises is raised.

    Args:
        backend: does the work; closing this one closes it.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name = backend.name
        self.default_concurrency = backend.default_concurrency
        self.keeps_prefixes = backend.keeps_prefixes

    @property
    def capabilities(self) -> Capabilities:
        """Those of the backend."""
        return self.backend.capabilities

    @property
    def identity(self) -> str:
        """That of the backend, which gives the answers."""
        return self.backend.identity

    def check(self, request: GenRequest) -> None:
        """Refuse what the backend cannot do; see :meth:`Backend.check`."""
        self.backend.check(request)

    def check_select(self, request: GenRequest) -> None:
        """Refuse a choice that the backend cannot make; see :meth:`Backend.check_select`."""
        self.backend.check_select(request)

    async def chat_template_in_use(self) -> ChatTemplate:
        """The one set here, or that of the backend."""
        return self.chat_template or await self.backend.chat_template_in_use()

    def statistics(self) -> Mapping[str, float]:
        """Those of the backend."""
        return self.backend.statistics()

    async def cache_prefix(self, request: GenRequest) -> None:
        """Compute a prompt ahead; see :meth:`Backend.cache_prefix`."""
        await self.backend.cache_prefix(request)

    async def get_server_info(self) -> dict[str, object]:
        """That of the backend; see :meth:`Backend.get_server_info`."""
        return await self.backend.get_server_info()

    async def flush_cache(self, *, wait: bool = False) -> bool:
        """Empty the backend's cache; see :meth:`Backend.flush_cache`."""
        return await self.backend.flush_cache(wait=wait)

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        """Begin to record at the backend; see :meth:`Backend.start_profile`."""
        return await self.backend.start_profile(output_dir=output_dir, num_steps=num_steps)

    async def stop_profile(self) -> str:
        """End the recording; see :meth:`Backend.stop_profile`."""
        return await self.backend.stop_profile()

    async def aclose(self) -> None:
        """Close the backend; closing twice is fine."""
        await self.backend.aclose()
