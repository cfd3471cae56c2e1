"""Backends around another one pass the utilities on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import asyncsgl as sgl
from asyncsgl.backends.base import Backend
from asyncsgl.backends.cached import cached
from asyncsgl.program.prefix import SharedPrefix
from asyncsgl.testing import RecordingBackend, ScriptedBackend

pytestmark = pytest.mark.anyio


class Tended(ScriptedBackend):
    """Answers the utilities."""

    async def get_server_info(self) -> dict[str, object]:
        return {"version": "1"}

    async def flush_cache(self, *, wait: bool = False) -> bool:
        return wait

    async def start_profile(
        self, *, output_dir: str | None = None, num_steps: int | None = None
    ) -> str:
        return f"{output_dir} {num_steps}"

    async def stop_profile(self) -> str:
        return "stopped"


@pytest.fixture(params=["recording", "shared prefix", "cached"])
def around(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Backend], Backend]:
    ways: dict[str, Callable[[Backend], Backend]] = {
        "recording": RecordingBackend,
        "shared prefix": SharedPrefix,
        "cached": lambda backend: cached(backend, tmp_path / "answers"),
    }
    return ways[request.param]


async def test_the_utilities_reach_the_backend(around: Callable[[Backend], Backend]) -> None:
    backend = around(Tended("x"))
    assert await sgl.get_server_info(backend) == {"version": "1"}
    assert await sgl.flush_cache(backend, wait=True) is True
    assert await sgl.flush_cache(backend) is False
    assert await sgl.start_profile(backend, output_dir="o", num_steps=2) == "o 2"
    assert await sgl.stop_profile(backend) == "stopped"


async def test_what_the_backend_lacks_is_refused(around: Callable[[Backend], Backend]) -> None:
    backend = around(ScriptedBackend("x"))
    with pytest.raises(sgl.UnsupportedFeature):
        await sgl.get_server_info(backend)
    with pytest.raises(sgl.UnsupportedFeature):
        await sgl.flush_cache(backend)
