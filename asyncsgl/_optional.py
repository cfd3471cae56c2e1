"""Imports that need an extra, with the extra named where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingDependency

__all__ = ["needs"]


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports in this block need ``extra``.

    Raises:
        MissingDependency: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "a package", extra) from error
