"""What every test runs under: asyncio, no blocking calls in the loop, bounded properties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

if TYPE_CHECKING:
    from collections.abc import Iterator

# The default suite gives the same result each time; the thorough profile searches on.
hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=50, print_blob=True
)
hypothesis.settings.register_profile(
    "thorough",
    deadline=None,
    max_examples=2000,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def anyio_backend() -> str:
    """The event loop that tests marked ``anyio`` run on."""
    return "asyncio"


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make a blocking call that our code makes in an event loop an error."""
    if "litellm" in request.node.name:  # it reads files on the event loop itself
        yield
        return
    with blockbuster_ctx(scanned_modules=["asyncsgl", "asyncsgl_engine"]) as blockers:
        # the blocking facade blocks its caller: that is what it is for
        blockers.functions["threading.Lock.acquire"].can_block_in("asyncsgl/sync/portal.py", "call")
        # the first use of an optional package imports it, once
        for function in blockers.functions.values():
            function.can_block_in("<frozen importlib._bootstrap>", "_find_and_load")
        yield
