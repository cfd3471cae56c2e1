"""What happens in a run: the events that streams give and instruments take."""

from __future__ import annotations

from .program.events import (
    BranchFinished,
    BranchStarted,
    Event,
    Listener,
    Reasoning,
    RunFinished,
    RunStarted,
    Text,
    VariableFailed,
    VariableFinished,
    VariableStarted,
)

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
