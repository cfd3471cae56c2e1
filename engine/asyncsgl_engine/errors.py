"""Everything the engine raises.

EngineError
├── ConfigError            a setting or the model does not hold together; nothing was started
├── ModelError             the model's files could not be found, fetched or loaded
├── InvalidRequest         a request that can never run
│   └── PromptTooLong      its prompt exceeds what the engine can hold
├── Overloaded             the queue is full; try again later
│   └── ImagesOverloaded   the images of other requests take all the memory for them
├── Closed                 the engine was shut down
├── StepFailed             a forward pass raised; the requests in it ended with this
├── RankFailed             a tensor-parallel rank ended, failed or hung; so did the engine
└── InternalError          the engine's books contradict each other: a bug in this package
"""

from __future__ import annotations

__all__ = [
    "Closed",
    "ConfigError",
    "EngineError",
    "ImagesOverloaded",
    "InternalError",
    "InvalidRequest",
    "ModelError",
    "Overloaded",
    "PromptTooLong",
    "RankFailed",
    "StepFailed",
]


class EngineError(Exception):
    """Base of all errors of this package."""


class ConfigError(EngineError, ValueError):
    """Raised when settings are out of range or do not fit the model or the device."""


class ModelError(EngineError):
    """Raised when a model cannot be found, fetched, converted or loaded."""


class InvalidRequest(EngineError, ValueError):
    """Raised for a request that can never run.

    Args:
        field: the request's field at fault.
        problem: what is wrong with it, with the range that is allowed.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, str]]:
        return type(self), (self.field, self.problem)


class PromptTooLong(InvalidRequest):
    """Raised for a prompt with more tokens than the engine can hold.

    Args:
        prompt_tokens: length of the prompt in tokens.
        limit: the most tokens a prompt may have here.
        reason: which setting the limit comes from.
    """

    def __init__(self, prompt_tokens: int, limit: int, reason: str) -> None:
        super().__init__(
            "prompt_ids",
            f"the prompt has {prompt_tokens} tokens, at most {limit} fit ({reason}); "
            "shorten it or raise that limit",
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        self.reason = reason

    def __reduce__(self) -> tuple[type[PromptTooLong], tuple[int, int, str]]:  # type: ignore[override]
        return type(self), (self.prompt_tokens, self.limit, self.reason)


class Overloaded(EngineError):
    """Raised when the queue is full.

    Args:
        waiting: requests in the queue.
        limit: the most it takes (`max_queued_requests`).
    """

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(
            f"{waiting} requests are waiting, the queue takes {limit}; "
            "try again later or raise max_queued_requests"
        )
        self.waiting = waiting
        self.limit = limit

    def __reduce__(self) -> tuple[type[Overloaded], tuple[int, int]]:
        return type(self), (self.waiting, self.limit)


class ImagesOverloaded(Overloaded):
    """Raised when the images of other requests leave no room for one more.

    Args:
        held: bytes that they take.
        limit: the most they may (`image_memory`).
    """

    def __init__(self, held: int, limit: int) -> None:
        super().__init__(held, limit)
        message = f"images of other requests take {held} bytes of {limit}; "
        self.args = (f"{message}try again later or raise image_memory",)


class Closed(EngineError):
    """Raised by a call on an engine that is shut down, and by requests a shutdown cut off."""


class StepFailed(EngineError):
    """Raised by the requests that were in a forward pass that failed; the cause is chained."""


class RankFailed(EngineError):
    """Raised when a tensor-parallel rank ended, failed or hung; the engine ends with it."""


class InternalError(EngineError):
    """Raised when the engine's books contradict each other, which is a bug in this package."""
