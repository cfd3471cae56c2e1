"""The settings that scripts for SGLang's frontend change."""

from __future__ import annotations

from ..backends.base import Backend
from ..errors import InvalidArgument
from ..program.defaults import get_default_backend, set_default_backend

__all__ = ["GlobalConfig", "global_config"]


class GlobalConfig:
    """SGLang's ``global_config``, as far as it has a meaning here.

    Attributes:
        verbosity: kept for scripts that set it; nothing reads it.
        enable_parallel_encoding: kept for scripts that set it; nothing reads it.
        enable_precache_with_tracing: kept for scripts that set it; what the rows of a batch
            have in common is always computed once.
    """

    def __init__(self) -> None:
        object.__setattr__(self, "verbosity", 0)
        object.__setattr__(self, "enable_parallel_encoding", True)
        object.__setattr__(self, "enable_precache_with_tracing", True)

    @property
    def default_backend(self) -> Backend | None:
        """The backend for runs that are given none."""
        return get_default_backend()

    @default_backend.setter
    def default_backend(self, backend: Backend | None) -> None:
        set_default_backend(backend)

    def __setattr__(self, name: str, value: object) -> None:
        if not hasattr(type(self), name) and name not in vars(self):
            known = ", ".join([*vars(self), "default_backend"])
            raise InvalidArgument(name, f"is no setting here; there is {known}")
        object.__setattr__(self, name, value)


global_config = GlobalConfig()
