"""Language-model programs as coroutines: prompts, generations, choices, forks and Python.

::

    import asyncsgl as sgl

    @sgl.function
    async def answer(s, question):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen("answer", max_tokens=64))

    async with sgl.Runtime() as runtime:
        state = await answer.run(question="What is the capital of France?", backend=runtime)
        print(state["answer"])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .backends.base import Backend, Capabilities
from .backends.spec import backend_from_spec
from .batch.executor import Outcome
from .errors import (
    AsyncSGLError,
    AuthenticationError,
    BackendConnectionError,
    BackendError,
    BackendTimeout,
    BadRequestError,
    BatchError,
    BudgetExceeded,
    ClosedError,
    ContentFilterError,
    ContextLengthError,
    InternalError,
    InvalidArgument,
    MissingDependency,
    NotFoundError,
    OutputError,
    OverloadedError,
    PermissionDeniedError,
    ProgramError,
    RateLimitError,
    TruncatedStreamError,
    UnknownVariable,
    UnsupportedFeature,
    UsageError,
)
from .lang.api import (
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    gen_int,
    gen_string,
    image,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)
from .lang.chat_template import (
    ChatTemplate,
    JinjaTemplate,
    NamedTemplate,
    get_chat_template,
    register_chat_template,
)
from .lang.choices import (
    ChoicesMethod,
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from .program.branches import Branches
from .program.defaults import get_default_backend, set_default_backend, use_backend
from .program.events import Event
from .program.program import Program, function
from .program.result import State
from .program.state import ProgramState
from .program.stream import ProgramStream
from .program.utilities import (
    cache_prefix,
    flush_cache,
    get_server_info,
    start_profile,
    stop_profile,
)
from .program.variable import Variable
from .types import GenRequest, Meta, SamplingParams, Usage

if TYPE_CHECKING:
    from .backends.anthropic import Anthropic
    from .backends.cached import cached
    from .backends.endpoint import RuntimeEndpoint
    from .backends.litellm import LiteLLM
    from .backends.openai import OpenAI
    from .backends.router import Router
    from .backends.runtime import Runtime
    from .backends.vertex import VertexAI

__version__ = "0.1.0"

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

_ON_FIRST_USE = {
    "Anthropic": ".backends.anthropic",
    "LiteLLM": ".backends.litellm",
    "OpenAI": ".backends.openai",
    "Router": ".backends.router",
    "Runtime": ".backends.runtime",
    "RuntimeEndpoint": ".backends.endpoint",
    "VertexAI": ".backends.vertex",
    "cached": ".backends.cached",
}
"""Names whose modules need an extra, or are slow to import."""


def __getattr__(name: str) -> object:
    if name in _ON_FIRST_USE:
        value: object = getattr(import_module(_ON_FIRST_USE[name], __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
