"""The folder of converted models: entries appear whole or not at all, built by one process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from filelock import FileLock, Timeout

from ..errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ModelCache", "Progress", "default_cache_root", "mebibytes"]

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the share of it that is done, None if that is unknown."""

_MANIFEST = "asyncsgl.json"


def default_cache_root() -> Path:
    """The user's cache folder for models; the variable `ASYNCSGL_CACHE` overrides it."""
    chosen = os.environ.get("ASYNCSGL_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("asyncsgl")


def mebibytes(count: int) -> str:
    """A number of bytes in MiB, for messages."""
    return f"{count / 2**20:,.0f} MiB"


@dataclass(frozen=True, slots=True)
class ModelCache:
    """Model folders by key.

    Args:
        root: where they are kept; made when first needed.
    """

    root: Path

    def get_or_build(
        self, key: str, build: Callable[[Path], Path], *, needs: int, progress: Progress
    ) -> Path:
        """The folder of `key`, built first if it is not there.

        Other processes and threads that want the same key wait for the one that builds it.

        Args:
            key: a file name that stands for the content; two contents never share one.
            build: makes the model's folder inside the scratch folder it is given, returns it.
            needs: bytes of disk the build takes at its peak.
            progress: told when it has to wait.

        Raises:
            ModelError: the disk is full or the cache cannot be written. Nothing half-made
                stays behind, whatever `build` raises.
        """
        entry = self.root / key
        if _is_whole(entry):
            return entry
        with self._writing(needs), self._locked(key, progress):
            if not _is_whole(entry):
                self._clear(key)
                self._check_room(needs)
                self._build(key, build)
        return entry

    def _build(self, key: str, build: Callable[[Path], Path]) -> None:
        scratch = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=self.root))
        try:
            made = build(scratch)
            _seal(made)
            made.rename(self.root / key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _clear(self, key: str) -> None:
        # What a killed process left, or an entry that lost files since.
        entry = self.root / key
        if entry.exists():
            entry.rename(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=self.root))
        for left in self.root.glob(f"{key}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _check_room(self, needs: int) -> None:
        if shutil.disk_usage(self.root).free < needs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root))

    @contextlib.contextmanager
    def _locked(self, key: str, progress: Progress) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / f"{key}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            progress("waiting for another process that prepares this model", None)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _writing(self, needs: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                problem = f"the disk is full: preparing this model takes {mebibytes(needs)}"
            else:
                problem = f"cannot write there: {error}"
            raise ModelError(
                f"model cache {self.root}: {problem}. Nothing half-made was kept. Free some "
                "space, or set ASYNCSGL_CACHE to a folder on another disk, and try again."
            ) from error


def _is_whole(entry: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((entry / _MANIFEST).read_text("utf-8"))["files"]
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _seal(folder: Path) -> None:
    """Write the list of files and their sizes, and force everything to the disk."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=2), "utf-8")
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
