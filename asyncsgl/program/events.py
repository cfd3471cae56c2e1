"""What happens in a run, as frozen events for streams and telemetry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..types import GenRequest, Meta, TokenLogprob

__all__ = [
    "BranchFinished",
    "BranchStarted",
    "Event",
    "Listener",
    "Reasoning",
    "RunFinished",
    "RunStarted",
    "Text",
    "VariableFailed",
    "VariableFinished",
    "VariableStarted",
]

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run of the program ``program`` begins."""

    program: str
    run_id: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run has ended; ``error`` says how it failed, if it did."""

    program: str
    run_id: str
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class BranchStarted:
    """A fork made the branch ``branch``; ``()`` is the main one, which is not announced."""

    branch: Path


@dataclass(frozen=True, slots=True)
class BranchFinished:
    """A branch failed or was joined."""

    branch: Path
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class VariableStarted:
    """The generation of a variable begins."""

    branch: Path
    name: str | None
    request: GenRequest
    backend: str


@dataclass(frozen=True, slots=True)
class Text:
    """New text: of the variable ``name``, or the program's own where ``name`` is None.

    Args:
        index: which of the ``n`` answers.
        logprobs: of the new tokens, where asked for.
    """

    branch: Path
    name: str | None
    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """New text of the reasoning that is split off from the variable ``name``."""

    branch: Path
    name: str | None
    text: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class VariableFinished:
    """A variable has its value."""

    branch: Path
    name: str | None
    value: str | list[str]
    meta: Meta | list[Meta]


@dataclass(frozen=True, slots=True)
class VariableFailed:
    """The generation of a variable failed or was cancelled."""

    branch: Path
    name: str | None
    error: BaseException


Event = (
    RunStarted
    | RunFinished
    | BranchStarted
    | BranchFinished
    | VariableStarted
    | Text
    | Reasoning
    | VariableFinished
    | VariableFailed
)


class Listener(Protocol):
    """Takes the events of one run; called on the event loop, so it must be quick.

    An exception of a listener fails the run.
    """

    def on(self, event: Event) -> None:
        """Take one event."""
