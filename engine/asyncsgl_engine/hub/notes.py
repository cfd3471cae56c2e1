"""What one start leaves for the next: small files that may be lost at any time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Notes", "Subject", "identify"]

_MOST = 32
_HASHED_BYTES = 64 << 20
_FORMAT = 1  # raise it when notes mean something else than before


@dataclass(frozen=True, slots=True)
class Subject:
    """What a note is about.

    Args:
        name: tells it from all others; the end of a file's name.
        traits: what the note holds for. Once anything of it is different, the note is void.
    """

    name: str
    traits: Mapping[str, object]


def identify(folder: Path) -> dict[str, object]:
    """What tells a model folder from itself after a change: its files.

    Of files above 64 MiB, which are the weights, by size and the second of their last change,
    of others by content too.

    Args:
        folder: must be there.

    Raises:
        OSError: it cannot be read.
    """
    return {path.name: _identify_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _identify_file(path: Path) -> str:
    status = path.stat()
    if status.st_size > _HASHED_BYTES:
        return f"{status.st_size} bytes of {int(status.st_mtime)}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Notes:
    """A folder of notes, the latest few.

    Processes may read and write the same note at the same time: each sees one whole version of
    it. Whatever is wrong with a note, or with the folder, it is as if the note were not there.

    Args:
        root: where they are kept; made when first needed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, subject: Subject) -> bytes | None:
        """What was written about a subject, if that is still there and holds."""
        path = self._path(subject)
        try:
            digest, _, rest = path.read_bytes().partition(b"\n")
            traits, _, body = rest.partition(b"\n")
            with contextlib.suppress(OSError):
                os.utime(path)  # so that it is not among the oldest
        except OSError:
            return None
        whole = digest == _digest(rest)
        return body if whole and traits == _line(subject.traits) else None

    def write(self, subject: Subject, body: bytes) -> None:
        """Write a note in place of what there was about the subject."""
        rest = _line(subject.traits) + b"\n" + body
        with contextlib.suppress(OSError):
            self._root.mkdir(parents=True, exist_ok=True)
            self._replace(self._path(subject), _digest(rest) + b"\n" + rest)
            self._drop_oldest()

    def erase(self, subject: Subject) -> None:
        """Forget what was written about a subject."""
        with contextlib.suppress(OSError):
            self._path(subject).unlink()

    def _path(self, subject: Subject) -> Path:
        return self._root / f"{subject.name}.note"

    def _replace(self, path: Path, content: bytes) -> None:
        handle, scratch = tempfile.mkstemp(dir=self._root, prefix=f"{path.name}.partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(scratch).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(scratch).unlink()
            raise

    def _drop_oldest(self) -> None:
        files = [path for path in self._root.iterdir() if ".note" in path.name]
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[_MOST:]:
            path.unlink(missing_ok=True)


def _line(traits: Mapping[str, object]) -> bytes:
    return json.dumps({"format": _FORMAT, **traits}, sort_keys=True).encode()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
