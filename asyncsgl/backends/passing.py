"""Backends around another one: what they pass on unchanged."""

from __future__ import annotations

from .base import Backend

__all__ = ["PassingBackend"]


class PassingBackend(Backend):
    """Passes the utilities on; they raise what the backend behind it raises.

    Attributes:
        backend: does the work.
    """

    backend: Backend

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
