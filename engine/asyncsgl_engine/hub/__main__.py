"""Fetch a model ahead of time and print its folder: `python -m asyncsgl_engine.hub [MODEL]`."""

from __future__ import annotations

import sys

from ..errors import ModelError
from . import DEFAULT_MODEL, resolve_model


def main(arguments: list[str]) -> int:
    """Run the command.

    Args:
        arguments: the model's name, or nothing for the default one.

    Returns:
        An exit status: 0 when the model is there, 1 when it cannot be had, 2 for wrong usage.
    """
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        sys.stderr.write(f"usage: python -m {__package__} [MODEL]   (default {DEFAULT_MODEL})\n")
        return 2
    try:
        model = resolve_model(*arguments or (DEFAULT_MODEL,), progress=_print_progress)
    except ModelError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{model.path}\n")
    return 0


def _print_progress(stage: str, fraction: float | None) -> None:
    share = "" if fraction is None else f" {fraction:.0%}"
    sys.stderr.write(f"{stage}{share}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
