"""An SGLang server without a model, to test what speaks to one: real sockets, faults at will.

::

    async with FakeServer("Lima") as server:
        backend = asyncsgl.RuntimeEndpoint(server.url)
        ...
        assert server.requests[0].json["text"].endswith("capital of Peru?")
"""

from __future__ import annotations

from .faults import Abort, Cut, Drop, Fault, Hang, Refuse, Say, StreamError
from .http import Request
from .server import FakeServer

__all__ = [
    "Abort",
    "Cut",
    "Drop",
    "FakeServer",
    "Fault",
    "Hang",
    "Refuse",
    "Request",
    "Say",
    "StreamError",
]
