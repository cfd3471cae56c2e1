"""The part of a start that comes before PyTorch, whose import takes a second."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .config import EngineConfig
from .errors import RankFailed
from .hub import Progress, resolve_model

if TYPE_CHECKING:
    from .loading import Loaded

__all__ = ["start"]


def start(
    config: EngineConfig, progress: Progress, on_fault: Callable[[RankFailed], None]
) -> Loaded:
    """Find, load and connect everything; blocks for as long as that takes.

    Args:
        config: as asked for.
        progress: called with a stage and the share of it that is done (None: unknown). The last
            call says that all of the last stage is.
        on_fault: called, on another thread, when a tensor-parallel rank ends or hangs.

    Raises:
        ModelError: the model or its tokenizer cannot be found or loaded.
        ConfigError: the settings do not fit the model or the machine.
        RankFailed: a tensor-parallel rank could not load its part.
    """
    found = resolve_model(config.model_path, progress=progress)
    _read_ahead(found.path)
    progress("Starting PyTorch", None)
    from .loading import load

    return load(config, found.path, progress, on_fault)


def _read_ahead(folder: Path) -> None:
    """Ask the system to fetch the weights from the disk while Python imports PyTorch."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
