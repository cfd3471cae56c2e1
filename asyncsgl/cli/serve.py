"""``asyncsgl serve``: a model behind SGLang's and OpenAI's HTTP routes."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from .server_flags import FLAGS, Flag, job_of

__all__ = ["SERVE_HELP", "serve"]

SERVE_HELP = """Serve a model over HTTP, for SGLang's clients and for OpenAI's.

The line `asyncsgl: ready on http://…` on the standard error tells that requests are answered.
SIGTERM or Ctrl-C refuses new requests and waits for those that run; a second one ends at once.

**Examples**

- `asyncsgl serve`

- `asyncsgl serve --model ./my-model --port 8000`

- `ASYNCSGL_API_KEY=… asyncsgl serve --host 0.0.0.0`
"""


def serve(**given: Any) -> None:
    """Serve a model over HTTP."""
    del given["debug"]  # the command line's own
    raise typer.Exit(job_of(given).run())


def _parameter(flag: Flag) -> Parameter:
    """A flag in the form that typer reads a command's flags from."""
    spellings = list(flag.spellings)
    if flag.kind is bool and flag.default:
        spellings[0] += f"/--no-{flag.name.replace('_', '-')}"
    option = typer.Option(
        *spellings,
        help=flag.help,
        envvar=flag.variable,
        show_envvar=flag.variable is not None,
        rich_help_panel=flag.panel,
    )
    kind = flag.kind if flag.default is not None else flag.kind | None
    return Parameter(
        flag.name, Parameter.KEYWORD_ONLY, default=flag.default, annotation=Annotated[kind, option]
    )


def _signature() -> Signature:
    debug = typer.Option("--debug", help="Show where an error comes from.")
    return Signature(
        [
            *map(_parameter, FLAGS),
            Parameter(
                "debug", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, debug]
            ),
        ]
    )


serve.__signature__ = _signature()  # type: ignore[attr-defined]
