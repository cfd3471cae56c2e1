"""Records what the engine computes, with torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from .config import ProfileOptions
from .errors import InvalidRequest

__all__ = ["Profiler"]


class Profiler:
    """Records this process, one recording at a time.

    All of its threads: the forward pass may have one of its own, and so have the masks.
    """

    def __init__(self) -> None:
        self._recording: profile | None = None

    def start(self, options: ProfileOptions) -> None:
        """Begin a recording.

        Args:
            options: what to record.

        Raises:
            InvalidRequest: one is under way.
        """
        if self._recording is not None:
            raise InvalidRequest("profile", "one is being recorded; stop it first")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._recording = profile(
            activities=activities,
            with_stack=options.with_stack,
            record_shapes=options.record_shapes,
            profile_memory=options.memory,
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )
        self._recording.start()

    def stop(self, path: Path) -> None:
        """End the recording and write a trace that Chrome and Perfetto show.

        Args:
            path: of the file, which may end in `.gz`, in a folder that is there.

        Raises:
            InvalidRequest: nothing is being recorded.
        """
        recording, self._recording = self._recording, None
        if recording is None:
            raise InvalidRequest("profile", "none is being recorded; start one first")
        recording.stop()
        recording.export_chrome_trace(str(path))

    def close(self) -> None:
        """End the recording, if there is one, and write nothing."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.stop()
