"""Tensor parallelism: one model in several processes, each with a part of every layer."""

from __future__ import annotations

from .ranks import Ranks
from .start import Start

__all__ = ["Ranks", "Start"]
