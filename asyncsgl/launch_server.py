"""``python -m asyncsgl.launch_server``: ``asyncsgl serve`` with the flags of SGLang's server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .cli.server_flags import FLAGS, Flag, job_of
from .cli.server_job import ServerJob
from .errors import AsyncSGLError

__all__ = ["job_asked", "main"]

_USAGE = 2
_ALWAYS = ("--enable-metrics", "--enable-cache-report", "--skip-server-warmup")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in this program's words."""

    def error(self, message: str) -> NoReturn:
        """Refuse, and tell where the flags are listed."""
        if message.startswith("unrecognized arguments: "):
            flags = message.removeprefix("unrecognized arguments: ")
            message = f"this server has no {flags}: leave it out, or see --help for what it has"
        self.exit(_USAGE, f"asyncsgl: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m asyncsgl.launch_server",
        description="Serve a model over HTTP, with the flags of SGLang's server.",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.panel not in groups:
            groups[flag.panel] = parser.add_argument_group(flag.panel)
        groups[flag.panel].add_argument(*flag.spellings, **_options(flag))
    parser.set_defaults(log_level="info")  # as SGLang's
    for spelling in _ALWAYS:
        parser.add_argument(spelling, action="store_true", help="This is always so.")
    return parser


def _options(flag: Flag) -> dict[str, Any]:
    """A flag in the form that argparse takes."""
    options: dict[str, Any] = {"help": flag.help, "default": flag.default}
    if flag.name == "model_path":
        options["required"] = True
    if flag.variable is not None:
        options["default"] = os.environ.get(flag.variable)
        options["help"] += f" [variable: {flag.variable}]"
    if flag.kind is bool:
        options["action"] = argparse.BooleanOptionalAction if flag.default else "store_true"
    elif flag.kind == list[str]:
        options["action"] = "append"
    else:
        options["type"] = flag.kind
    return options


def job_asked(arguments: Sequence[str] | None = None) -> ServerJob:
    """The server that a command line asks for; ends the process where it cannot be read.

    Args:
        arguments: by default the command line's.
    """
    return job_of(vars(_parser().parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it.

    Args:
        arguments: by default the command line's.

    Returns:
        The exit status.
    """
    job = job_asked(arguments)
    try:
        return job.run()
    except AsyncSGLError as error:
        sys.stderr.write(f"asyncsgl: error: {error}\n")
        return _USAGE


if __name__ == "__main__":
    sys.exit(main())
