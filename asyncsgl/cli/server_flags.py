"""The flags of a server, written once for `asyncsgl serve` and `asyncsgl.launch_server`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .server_job import DEFAULT_PORT, DEFAULT_QUEUE, ServerJob

__all__ = ["FLAGS", "Flag", "job_of"]

_SERVER = "Server"
_ACCESS = "Access"
_ENGINE = "Engine"
_LIMITS = "Limits"
_PLACES = "Places"


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Args:
        name: the setting's name, in SGLang's words where SGLang has it; the flag is the same
            with dashes.
        kind: of its value; a list is given by repeating the flag.
        default: what holds without it.
        help: a sentence.
        panel: the heading it is listed under.
        sets: whose setting it is: the engine's, the server's, or the process's own.
        also: other spellings of the flag.
        variable: an environment variable that gives it, too.
    """

    name: str
    kind: Any
    default: Any
    help: str
    panel: str
    sets: Literal["engine", "server", "job"]
    also: tuple[str, ...] = ()
    variable: str | None = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """How it is written on the command line."""
        return (f"--{self.name.replace('_', '-')}", *self.also)


def _engine(
    name: str, kind: Any, default: Any, text: str, panel: str = _ENGINE, also: tuple[str, ...] = ()
) -> Flag:
    return Flag(name, kind, default, text, panel, "engine", also)


def _server(
    name: str, kind: Any, default: Any, text: str, panel: str, variable: str | None = None
) -> Flag:
    return Flag(name, kind, default, text, panel, "server", (), variable)


def _job(name: str, kind: Any, default: Any, text: str, panel: str) -> Flag:
    return Flag(name, kind, default, text, panel, "job")


FLAGS: tuple[Flag, ...] = (
    _engine(
        "model_path",
        str,
        "smollm2-135m-instruct",
        "The default model's name, a Hugging Face id, a folder, or a .gguf.",
        _SERVER,
        ("--model",),
    ),
    _job("host", str, "127.0.0.1", "The interface to serve on.", _SERVER),
    _job("port", int, DEFAULT_PORT, "0 takes a free one.", _SERVER),
    _server(
        "served_model_name", str, None, "What clients see instead of the model's path.", _SERVER
    ),
    _job("log_level", str, "warning", "critical, error, warning, info or debug.", _SERVER),
    _server(
        "incremental_streaming_output",
        bool,
        False,
        "Chunks of /generate bring only what is new.",
        _SERVER,
    ),
    # -- who may ask ----------------------------------------------------------------------------
    _server(
        "api_key",
        str,
        None,
        "Ask for this key. Others can see arguments: prefer the variable.",
        _ACCESS,
        "ASYNCSGL_API_KEY",
    ),
    _server(
        "admin_api_key",
        str,
        None,
        "Ask for this key on routes that act on the whole server.",
        _ACCESS,
        "ASYNCSGL_ADMIN_API_KEY",
    ),
    _server("allow_local_media", Path, None, "Read images from paths below this folder.", _ACCESS),
    _server(
        "allow_media_domains",
        list[str],
        None,
        "Fetch images from this host; repeatable.",
        _ACCESS,
    ),
    # -- what computes --------------------------------------------------------------------------
    _engine("tokenizer_path", str, None, "Another place for the tokenizer."),
    _engine("dtype", str, "auto", "auto, float32, bfloat16 or float16."),
    _engine("device", str, "auto", "auto, cpu or cuda."),
    _engine(
        "tp_size",
        int,
        1,
        "Processes that share the model, each with a GPU where there are GPUs.",
        also=("--tensor-parallel-size", "--tp"),
    ),
    _engine("watchdog_timeout", float, 300.0, "Seconds a step of theirs may take."),
    _engine("page_size", int, 16, "Tokens in a page of the cache."),
    _engine("max_total_tokens", int, None, "Tokens the cache holds."),
    _engine("mem_fraction_static", float, None, "Share of free memory for the cache."),
    _engine(
        "chunked_prefill_size", int, None, "Tokens in a step at most; -1 never splits a prompt."
    ),
    _engine("disable_radix_cache", bool, False, "Share no prefixes."),
    _engine("disable_overlap_schedule", bool, None, "Plan no step during the one before it."),
    _engine("disable_cuda_graph", bool, False, "Launch every operation of a step on its own."),
    _engine("cuda_graph_max_bs", int, 256, "Sequences in a step that is replayed as a CUDA graph."),
    _engine("enable_native", bool, True, "Use the compiled kernels for processors."),
    _engine("num_threads", int, None, "Threads for tensor work."),
    _engine("random_seed", int, 0, "Seeds requests that bring no seed."),
    _engine("debug_check", bool, False, "Prove the engine's books after every step; slow."),
    # -- how much of it -------------------------------------------------------------------------
    _engine("max_running_requests", int, None, "Sequences in a step at most.", _LIMITS),
    _engine(
        "max_queued_requests",
        int,
        DEFAULT_QUEUE,
        "Sequences that wait at most; more get 503.",
        _LIMITS,
    ),
    _engine("context_length", int, None, "Tokens of a prompt and its answer.", _LIMITS),
    _engine("max_images", int, 32, "Images of a prompt at most.", _LIMITS),
    _engine("max_image_pixels", int, 64_000_000, "Width times height of an image.", _LIMITS),
    _engine("image_memory", int, 1 << 30, "Bytes of images' embeddings at most.", _LIMITS),
    _server("max_requests", int, None, "Generating requests that are let in at most.", _LIMITS),
    _server("max_request_body", int, 16 << 20, "Bytes of a body at most.", _LIMITS),
    _server("max_uploads", int, 200 << 20, "Bytes of an uploaded file at most.", _LIMITS),
    _server("max_media_bytes", int, 20 << 20, "Bytes of an image at most.", _LIMITS),
    _server(
        "request_timeout", float, None, "Seconds a request may take, waiting included.", _LIMITS
    ),
    _server("body_timeout", float, 30.0, "Seconds a client may take to send a body.", _LIMITS),
    _job("drain_limit", float, 30.0, "Seconds that running requests get at the end.", _LIMITS),
    # -- where things are kept ------------------------------------------------------------------
    _job("batches", bool, True, "Offer /v1/files and /v1/batches.", _PLACES),
    _server("batch_folder", Path, None, "Where files and batches are kept.", _PLACES),
    _server("batch_concurrency", int, 32, "Requests of batches that run at once.", _PLACES),
    _server("profile_folder", Path, None, "Where traces are written.", _PLACES),
)


def job_of(given: Mapping[str, Any]) -> ServerJob:
    """The server that flags ask for.

    Args:
        given: every flag's value, by its name.
    """
    parts: dict[str, dict[str, Any]] = {"engine": {}, "server": {}, "job": {}}
    for flag in FLAGS:
        value = given[flag.name]
        parts[flag.sets][flag.name] = tuple(value) if isinstance(value, list) else value
    server = parts["server"]
    server["allow_media_domains"] = server["allow_media_domains"] or ()
    if server["batch_folder"] is None:
        del server["batch_folder"]  # the user's own, or none
    return ServerJob(parts["engine"], server, **parts["job"])
