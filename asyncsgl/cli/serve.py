"""``asyncsgl serve``: a model behind SGLang's and OpenAI's HTTP routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .server_job import DEFAULT_PORT, DEFAULT_QUEUE, ServerJob

__all__ = ["SERVE_HELP", "serve"]

_ENGINE = "Engine"
_LIMITS = "Limits"
_ACCESS = "Access"
_PLACES = "Places"

SERVE_HELP = """Serve a model over HTTP, for SGLang's clients and for OpenAI's.

The line `asyncsgl: ready on http://…` on the standard error tells that requests are answered.
SIGTERM or Ctrl-C refuses new requests and waits for those that run; a second one ends at once.

**Examples**

- `asyncsgl serve`

- `asyncsgl serve --model ./my-model --port 8000`

- `ASYNCSGL_API_KEY=… asyncsgl serve --host 0.0.0.0`
"""


def serve(
    *,
    model: Annotated[
        str, typer.Option(help="The default model's name, a Hugging Face id, a folder, or a .gguf.")
    ] = "smollm2-135m-instruct",
    host: Annotated[str, typer.Option(help="The interface to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients see instead of the model's path.")
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="critical, error, warning, info or debug.")
    ] = "warning",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ASYNCSGL_API_KEY",
            show_envvar=True,
            help="Ask for this key. Others can see arguments: prefer the variable.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ASYNCSGL_ADMIN_API_KEY",
            show_envvar=True,
            help="Ask for this key on routes that act on the whole server.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_local_media: Annotated[
        Path | None,
        typer.Option(help="Read images from paths below this folder.", rich_help_panel=_ACCESS),
    ] = None,
    allow_media_domains: Annotated[
        list[str] | None,
        typer.Option(help="Fetch images from this host; repeatable.", rich_help_panel=_ACCESS),
    ] = None,
    tokenizer_path: Annotated[
        str | None,
        typer.Option(help="Another place for the tokenizer.", rich_help_panel=_ENGINE),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_ENGINE),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_ENGINE)
    ] = "auto",
    page_size: Annotated[
        int, typer.Option(help="Tokens in a page of the cache.", rich_help_panel=_ENGINE)
    ] = 16,
    max_total_tokens: Annotated[
        int | None, typer.Option(help="Tokens the cache holds.", rich_help_panel=_ENGINE)
    ] = None,
    mem_fraction_static: Annotated[
        float | None,
        typer.Option(help="Share of free memory for the cache.", rich_help_panel=_ENGINE),
    ] = None,
    chunked_prefill_size: Annotated[
        int | None, typer.Option(help="Tokens in a step at most.", rich_help_panel=_ENGINE)
    ] = None,
    disable_radix_cache: Annotated[
        bool, typer.Option(help="Share no prefixes.", rich_help_panel=_ENGINE)
    ] = False,
    random_seed: Annotated[
        int, typer.Option(help="Seeds requests that bring no seed.", rich_help_panel=_ENGINE)
    ] = 0,
    num_threads: Annotated[
        int | None, typer.Option(help="Threads for tensor work.", rich_help_panel=_ENGINE)
    ] = None,
    max_running_requests: Annotated[
        int | None, typer.Option(help="Sequences in a step at most.", rich_help_panel=_LIMITS)
    ] = None,
    max_queued_requests: Annotated[
        int,
        typer.Option(help="Sequences that wait at most; more get 503.", rich_help_panel=_LIMITS),
    ] = DEFAULT_QUEUE,
    context_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt and its answer.", rich_help_panel=_LIMITS),
    ] = None,
    max_request_body: Annotated[
        int, typer.Option(help="Bytes of a body at most.", rich_help_panel=_LIMITS)
    ] = 16 << 20,
    request_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds a request may take, waiting included.", rich_help_panel=_LIMITS),
    ] = None,
    drain_limit: Annotated[
        float,
        typer.Option(min=0, help="Seconds running requests get.", rich_help_panel=_LIMITS),
    ] = 30.0,
    incremental_streaming_output: Annotated[
        bool, typer.Option(help="Chunks of /generate bring only what is new.")
    ] = False,
    batches: Annotated[
        bool,
        typer.Option(help="Offer /v1/files and /v1/batches.", rich_help_panel=_PLACES),
    ] = True,
    batch_folder: Annotated[
        Path | None,
        typer.Option(help="Where files and batches are kept.", rich_help_panel=_PLACES),
    ] = None,
    profile_folder: Annotated[
        Path | None, typer.Option(help="Where traces are written.", rich_help_panel=_PLACES)
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show where an error comes from.")] = False,
) -> None:
    """Serve a model over HTTP."""
    del debug  # the command line's own
    engine: dict[str, Any] = {
        "model_path": model,
        "tokenizer_path": tokenizer_path,
        "dtype": dtype,
        "device": device,
        "page_size": page_size,
        "max_total_tokens": max_total_tokens,
        "mem_fraction_static": mem_fraction_static,
        "max_running_requests": max_running_requests,
        "chunked_prefill_size": chunked_prefill_size,
        "context_length": context_length,
        "max_queued_requests": max_queued_requests,
        "disable_radix_cache": disable_radix_cache,
        "random_seed": random_seed,
        "num_threads": num_threads,
    }
    server: dict[str, Any] = {
        "served_model_name": served_model_name,
        "api_key": api_key,
        "admin_api_key": admin_api_key,
        "max_request_body": max_request_body,
        "request_timeout": request_timeout,
        "incremental_streaming_output": incremental_streaming_output,
        "allow_local_media": allow_local_media,
        "allow_media_domains": tuple(allow_media_domains or ()),
        "profile_folder": profile_folder,
    }
    if batch_folder is not None:
        server["batch_folder"] = batch_folder
    job = ServerJob(
        engine,
        server,
        host,
        port,
        log_level=log_level,
        drain_limit=drain_limit,
        batches=batches,
    )
    raise typer.Exit(job.run())
