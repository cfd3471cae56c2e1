"""The commands, and how their errors and ends become exit statuses."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import AsyncSGLError, InternalError, MissingDependency
from .batch import BATCH_HELP, batch
from .extras import extra_of
from .serve import SERVE_HELP, serve
from .version import version_line

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["app", "run"]

_USAGE = 2
_INTERRUPTED = 130

app = typer.Typer(
    name="asyncsgl",
    help="Language-model programs over a local engine and remote providers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(help=BATCH_HELP)(batch)
app.command(help=SERVE_HELP)(serve)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_line())
        raise typer.Exit


@app.callback()
def asyncsgl(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say it and end."),
    ] = False,
) -> None:
    """Run language-model programs over a local engine and remote providers."""


def run(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name.

    Returns:
        the exit status.
    """
    debug = "--debug" in arguments
    try:
        app(list(arguments), prog_name="asyncsgl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else _USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except AsyncSGLError as error:
        kind = "bug in asyncsgl" if isinstance(error, InternalError) else "error"
        return _failed(kind, str(error), debug=debug)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name or "")
        if extra is None:
            return _failed("error", str(error), debug=debug)
        return _failed("error", str(MissingDependency(error.name or "", extra)), debug=debug)
    except Exception as error:  # noqa: BLE001 - the last resort
        return _failed("error", f"{type(error).__name__}: {error}", debug=debug)
    return 0


def _failed(kind: str, message: str, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    typer.secho(f"asyncsgl: {kind}: ", fg="red", err=True, nl=False)
    typer.echo(message, err=True)
    if kind != "error" and not debug:
        typer.echo("Run it again with --debug and report what it prints.", err=True)
    sys.stderr.flush()
    return _USAGE
