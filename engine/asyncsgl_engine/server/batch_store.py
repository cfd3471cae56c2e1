"""Files and batches in a folder, which outlive the process; every call blocks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

__all__ = ["BatchStore", "Kind", "Outcome"]

Kind = Literal["files", "batches"]
Outcome = Literal["output", "error"]


class BatchStore:
    """A folder of files and batches, for one server at a time.

    Each thing has a JSON file that is replaced as a whole; results are appended to line by
    line, and a line that was cut off is dropped when they are read again.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / "lock", timeout=0, thread_local=False)
        self._appending = threading.Lock()

    def open(self) -> bool:
        """Take the folder; False if another process has it."""
        for kind in ("files", "batches"):
            (self._folder / kind).mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    # -- things ---------------------------------------------------------------------------------

    def get(self, kind: Kind, name: str) -> dict[str, Any] | None:
        """A thing by its id; None if there is no such thing."""
        try:
            found: dict[str, Any] = json.loads(self._path(kind, name, "json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found

    def put(self, kind: Kind, thing: dict[str, Any]) -> None:
        """Write a thing, whole or not at all."""
        path = self._path(kind, thing["id"], "json")
        draft = path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(thing, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def all(self, kind: Kind) -> list[dict[str, Any]]:
        """Everything of a kind, newest first."""
        names = [path.stem for path in (self._folder / kind).glob("*.json")]
        things = [thing for name in names if (thing := self.get(kind, name)) is not None]
        return sorted(things, key=lambda thing: (-thing["created_at"], thing["id"]))

    def add_file(self, source: IO[bytes], filename: str, purpose: str) -> dict[str, Any]:
        """Keep what a client uploaded."""
        name = f"file-{uuid.uuid4().hex}"
        path = self._path("files", name, "data")
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
        return self._describe(name, filename, purpose)

    def content(self, name: str) -> Path:
        """Where a file's bytes are."""
        return self._path("files", name, "data")

    def remove_file(self, name: str) -> None:
        """Forget a file."""
        for ending in ("json", "data"):
            self._path("files", name, ending).unlink(missing_ok=True)

    def _describe(self, name: str, filename: str, purpose: str) -> dict[str, Any]:
        thing = {
            "id": name,
            "object": "file",
            "bytes": self.content(name).stat().st_size,
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        self.put("files", thing)
        return thing

    def _path(self, kind: Kind, name: str, ending: str) -> Path:
        if not name.replace("-", "").replace("_", "").isalnum():
            name = "no-such-id"  # an id is never a path
        return self._folder / kind / f"{name}.{ending}"

    # -- results --------------------------------------------------------------------------------

    def lines(self, file: str) -> Iterator[tuple[int, str]]:
        """The lines of a file that are not empty, with their numbers from 1."""
        with self.content(file).open(encoding="utf-8") as source:
            for number, line in enumerate(source, 1):
                if line.strip():
                    yield number, line

    def append(self, batch: str, outcome: Outcome, result: dict[str, Any]) -> None:
        """Add a result to a batch."""
        line = json.dumps(result).encode() + b"\n"
        with self._appending, self._path("batches", batch, outcome).open("ab") as file:
            file.write(line)

    def done(self, batch: str) -> dict[Outcome, set[str]]:
        """The `custom_id`s a batch has results for; what was cut off is dropped."""
        outcomes: tuple[Outcome, ...] = ("output", "error")
        return {
            outcome: self._mended(self._path("batches", batch, outcome)) for outcome in outcomes
        }

    def _mended(self, path: Path) -> set[str]:
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
            whole = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                names.add(json.loads(line)["custom_id"])
                whole += len(line)
            file.truncate(whole)
        return names

    def finish(self, batch: str, outcome: Outcome) -> str | None:
        """Turn a batch's results into a file; None if there are none."""
        path = self._path("batches", batch, outcome)
        name = f"file-{batch.removeprefix('batch_')}-{outcome}"
        if path.exists():
            path.replace(self.content(name))
        if not self.content(name).exists():
            return None
        return str(self._describe(name, f"{batch}_{outcome}.jsonl", "batch_output")["id"])
