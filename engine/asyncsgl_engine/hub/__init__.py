"""Find models: built in, in a folder or GGUF file, or on a Hugging Face hub."""

from __future__ import annotations

from .cache import Progress
from .resolve import BUILT_IN, DEFAULT_MODEL, ResolvedModel, check_folder, resolve_model

__all__ = [
    "BUILT_IN",
    "DEFAULT_MODEL",
    "Progress",
    "ResolvedModel",
    "check_folder",
    "resolve_model",
]
