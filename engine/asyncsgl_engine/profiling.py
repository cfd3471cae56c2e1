"""Records what one thread computes, with torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .config import ProfileOptions

__all__ = ["Profile"]


class Profile:
    """A recording of the thread that makes it, which begins at once.

    Args:
        options: what to record.
    """

    def __init__(self, options: ProfileOptions) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            with_stack=options.with_stack,
            record_shapes=options.record_shapes,
            profile_memory=options.memory,
        )
        self._profile.start()

    def stop(self, path: Path) -> None:
        """End it and write a Chrome trace.

        Args:
            path: of the file, in a folder that is there.
        """
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))

    def drop(self) -> None:
        """End it and write nothing."""
        self._profile.stop()
