"""The client of SGLang servers for callers that block."""

from __future__ import annotations

from ..backends.endpoint import RuntimeEndpoint as AsyncEndpoint
from .blocking import BlockingUtilities

__all__ = ["RuntimeEndpoint"]


class RuntimeEndpoint(BlockingUtilities, AsyncEndpoint):
    """A server that speaks SGLang's protocol. Takes what :class:`asyncsgl.RuntimeEndpoint` takes."""
