"""Backends: the places where models run."""

from __future__ import annotations

from .base import FEATURES, Backend, Capabilities, Support
from .spec import backend_from_spec

__all__ = ["FEATURES", "Backend", "Capabilities", "Support", "backend_from_spec"]
