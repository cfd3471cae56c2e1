"""The engine's C code, for tests that need it."""

from __future__ import annotations

import os
import shutil
from functools import cache

import pytest

from asyncsgl_engine.hub.cache import default_cache_root
from asyncsgl_engine.native import Library, build_library

__all__ = ["HAS_COMPILER", "compiled"]

HAS_COMPILER = os.name == "posix" and shutil.which(os.environ.get("CC", "cc")) is not None


@cache
def _built() -> Library | None:
    return build_library(default_cache_root() / "native")  # kept: compiling takes seconds


def compiled() -> Library:
    """The library; the test is skipped where there is no compiler, and fails where that fails."""
    if not HAS_COMPILER:
        pytest.skip("no C compiler here")
    library = _built()
    assert library is not None, "the C code cannot be compiled: the log says why"
    return library
