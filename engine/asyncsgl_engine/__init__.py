"""Continuous batching over a paged, prefix-shared KV cache, on transformers' models."""

from __future__ import annotations

from .errors import (
    Closed,
    ConfigError,
    EngineError,
    InternalError,
    InvalidRequest,
    ModelError,
    Overloaded,
    PromptTooLong,
    RankFailed,
    StepFailed,
)
from .request import Completion, Delta, Finish, Grammar, Request, Sampling, TokenLogprob

__all__ = [
    "Closed",
    "Completion",
    "ConfigError",
    "Delta",
    "EngineError",
    "Finish",
    "Grammar",
    "InternalError",
    "InvalidRequest",
    "ModelError",
    "Overloaded",
    "PromptTooLong",
    "RankFailed",
    "Request",
    "Sampling",
    "StepFailed",
    "TokenLogprob",
]
