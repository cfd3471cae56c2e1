"""Many runs: bounded execution, input shapes, durable results and their display."""

from __future__ import annotations

from .executor import BatchObserver, Outcome, bounded

__all__ = ["BatchObserver", "Outcome", "bounded"]
