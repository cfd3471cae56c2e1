"""The local engine for callers that block."""

from __future__ import annotations

from typing import Any

from ..backends.runtime import Runtime as AsyncRuntime
from .blocking import BlockingUtilities
from .portal import PORTAL

__all__ = ["Runtime"]


class Runtime(BlockingUtilities, AsyncRuntime):
    """A model in this process. The constructor returns when the model is loaded.

    Takes what :class:`asyncsgl.Runtime` takes, and raises what its constructor and its
    ``start`` raise. Call :meth:`shutdown` when done.
    """

    def __init__(self, model_path: str = "smollm2-135m-instruct", **settings: Any) -> None:
        super().__init__(model_path, **settings)
        try:
            PORTAL.call(self.start)
        except BaseException:
            self.shutdown()
            raise
