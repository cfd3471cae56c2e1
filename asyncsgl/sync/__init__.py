"""The same API for callers that block: ``import asyncsgl.sync as sgl``.

Scripts written for SGLang's frontend run with their import changed. Programs may be plain
``def``, where ``s["x"]`` waits and gives a text, or ``async def``. Everything runs on one
event loop in a background thread, so it works in scripts, in notebooks whose own loop runs,
and from several threads at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import asyncsgl

from .config import global_config
from .program import BlockingProgram, function
from .stream import StreamingState
from .utilities import (
    cache_prefix,
    flush_cache,
    get_server_info,
    start_profile,
    stop_profile,
)

if TYPE_CHECKING:
    from asyncsgl import (
        Anthropic,
        AsyncSGLError,
        AuthenticationError,
        Backend,
        BackendConnectionError,
        BackendError,
        BackendTimeout,
        BadRequestError,
        BatchError,
        Branches,
        BudgetExceeded,
        Capabilities,
        ChatTemplate,
        ChoicesMethod,
        ClosedError,
        ContentFilterError,
        ContextLengthError,
        Event,
        GenRequest,
        InternalError,
        InvalidArgument,
        JinjaTemplate,
        LiteLLM,
        Meta,
        MissingDependency,
        NamedTemplate,
        NotFoundError,
        OpenAI,
        Outcome,
        OutputError,
        OverloadedError,
        PermissionDeniedError,
        Program,
        ProgramError,
        ProgramState,
        ProgramStream,
        RateLimitError,
        Router,
        SamplingParams,
        State,
        TruncatedStreamError,
        UnknownVariable,
        UnsupportedFeature,
        Usage,
        UsageError,
        Variable,
        VertexAI,
        assistant,
        assistant_begin,
        assistant_end,
        backend_from_spec,
        cached,
        gen,
        gen_int,
        gen_string,
        get_chat_template,
        get_default_backend,
        greedy_token_selection,
        image,
        register_chat_template,
        select,
        separate_reasoning,
        set_default_backend,
        system,
        system_begin,
        system_end,
        token_length_normalized,
        unconditional_likelihood_normalized,
        use_backend,
        user,
        user_begin,
        user_end,
        video,
    )

    from .endpoint import RuntimeEndpoint
    from .runtime import Runtime

__all__ = [
    "Anthropic",
    "AsyncSGLError",
    "AuthenticationError",
    "Backend",
    "BackendConnectionError",
    "BackendError",
    "BackendTimeout",
    "BadRequestError",
    "BatchError",
    "BlockingProgram",
    "Branches",
    "BudgetExceeded",
    "Capabilities",
    "ChatTemplate",
    "ChoicesMethod",
    "ClosedError",
    "ContentFilterError",
    "ContextLengthError",
    "Event",
    "GenRequest",
    "InternalError",
    "InvalidArgument",
    "JinjaTemplate",
    "LiteLLM",
    "Meta",
    "MissingDependency",
    "NamedTemplate",
    "NotFoundError",
    "OpenAI",
    "Outcome",
    "OutputError",
    "OverloadedError",
    "PermissionDeniedError",
    "Program",
    "ProgramError",
    "ProgramState",
    "ProgramStream",
    "RateLimitError",
    "Router",
    "Runtime",
    "RuntimeEndpoint",
    "SamplingParams",
    "State",
    "StreamingState",
    "TruncatedStreamError",
    "UnknownVariable",
    "UnsupportedFeature",
    "Usage",
    "UsageError",
    "Variable",
    "VertexAI",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "backend_from_spec",
    "cache_prefix",
    "cached",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_chat_template",
    "get_default_backend",
    "get_server_info",
    "global_config",
    "greedy_token_selection",
    "image",
    "register_chat_template",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "start_profile",
    "stop_profile",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "use_backend",
    "user",
    "user_begin",
    "user_end",
    "video",
]

_ON_FIRST_USE = {"Runtime": ".runtime", "RuntimeEndpoint": ".endpoint"}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name], __name__), name)
    if name in asyncsgl.__all__:
        return getattr(asyncsgl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
