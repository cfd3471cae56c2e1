"""``python -m asyncsgl.launch_server``: ``asyncsgl serve`` with the flags of SGLang's server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .cli.server_job import DEFAULT_PORT, DEFAULT_QUEUE, ServerJob
from .errors import AsyncSGLError

__all__ = ["main"]

_ENGINE = (
    "model_path",
    "tokenizer_path",
    "dtype",
    "device",
    "page_size",
    "max_total_tokens",
    "mem_fraction_static",
    "max_running_requests",
    "max_queued_requests",
    "chunked_prefill_size",
    "context_length",
    "disable_radix_cache",
    "random_seed",
)
_SERVER = ("served_model_name", "api_key", "admin_api_key", "incremental_streaming_output")
_USAGE = 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in this program's words."""

    def error(self, message: str) -> NoReturn:
        """Refuse, and tell where the flags are listed."""
        if message.startswith("unrecognized arguments: "):
            flags = message.removeprefix("unrecognized arguments: ")
            message = f"this server has no {flags}: leave it out, or see --help for what it has"
        self.exit(_USAGE, f"asyncsgl: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m asyncsgl.launch_server", allow_abbrev=False)
    add = parser.add_argument
    add("--model-path", "--model", required=True)
    add("--tokenizer-path")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=DEFAULT_PORT)
    add("--served-model-name")
    add("--api-key")
    add("--admin-api-key")
    add("--log-level", default="info")
    add("--tp-size", "--tensor-parallel-size", "--tp", type=int, default=1)
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--page-size", type=int, default=16)
    add("--max-total-tokens", type=int)
    add("--mem-fraction-static", type=float)
    add("--max-running-requests", type=int)
    add("--max-queued-requests", type=int, default=DEFAULT_QUEUE)
    add("--chunked-prefill-size", type=int)
    add("--context-length", type=int)
    add("--disable-radix-cache", action="store_true")
    add("--random-seed", type=int, default=0)
    add("--incremental-streaming-output", action="store_true")
    always = "this is always so"
    add("--enable-metrics", action="store_true", help=always)
    add("--enable-cache-report", action="store_true", help=always)
    add("--skip-server-warmup", action="store_true", help=always)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it.

    Args:
        arguments: by default the command line's.

    Returns:
        The exit status.
    """
    given = vars(_parser().parse_args(arguments))
    job = ServerJob(
        {name: given[name] for name in _ENGINE},
        {name: given[name] for name in _SERVER},
        given["host"],
        given["port"],
        tp_size=given["tp_size"],
        log_level=given["log_level"],
    )
    try:
        return job.run()
    except AsyncSGLError as error:
        sys.stderr.write(f"asyncsgl: error: {error}\n")
        return _USAGE


if __name__ == "__main__":
    sys.exit(main())
