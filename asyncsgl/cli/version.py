"""What ``asyncsgl --version`` prints."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["version_line"]


def version_line() -> str:
    """The name and the installed version."""
    try:
        return f"asyncsgl {version('asyncsgl')}"
    except PackageNotFoundError:
        return "asyncsgl (not installed)"
