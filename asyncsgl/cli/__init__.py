"""The command ``asyncsgl``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit with its status.

    The status is 0 if all went well, 1 if some rows of a batch failed, 2 for wrong usage and
    whatever keeps a command from its work, 130 or 143 after SIGINT or SIGTERM.
    """
    if sys.argv[1:] == ["--version"]:
        from .version import version_line

        print(version_line())  # noqa: T201 - the answer, before anything slow is imported
        return
    from .app import run

    sys.exit(run(sys.argv[1:]))
