"""Compiles the C code, once for each machine."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

__all__ = ["SUFFIXES", "Library", "build_library"]

_log = logging.getLogger(__name__)
_MOST_TOLD = 2000
_SOURCES = Path(__file__).with_name("source")
_MAIN = "decoder.c"
# The parts of -ffast-math that let sums be vectorised. Not the whole: it would make the linker
# add start-up code that flushes denormal numbers to zero in every thread that loads the library.
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fassociative-math", "-freciprocal-math"),
    *("-fno-math-errno", "-fno-signed-zeros", "-fno-trapping-math"),
)
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # in the order of BF16 in the C code


class Library:
    """The compiled code.

    Args:
        path: of the shared library.

    Attributes:
        name: tells source, flags, compiler and processor apart.
        tile_columns: columns of a matrix that are packed together.

    Raises:
        OSError: it cannot be loaded here.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.name = path.name
        count = self._library.asyncsgl_tile_columns
        count.restype = ctypes.c_int64
        self.tile_columns: int = count()

    def function(self, name: str, dtype: torch.dtype | None = None) -> ctypes._NamedFuncPointer:
        """A function of the library, for one element type where it has one for each."""
        whole = name if dtype is None else f"{name}_{SUFFIXES[dtype]}"
        function: ctypes._NamedFuncPointer = getattr(self._library, whole)
        return function


def build_library(folder: Path) -> Library | None:
    """Compile the C code, or find it compiled.

    Args:
        folder: where the library is kept, under a name that tells source, flags, compiler and
            processor apart; made when first needed.

    Returns:
        None where there is no compiler, and where it fails: then a warning has its words.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.name != "posix":
        return None
    try:
        return Library(_built(compiler, folder))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or b""
        _log.warning(
            "the C code cannot be compiled with %s, so PyTorch's operators compute, more slowly: %s",
            compiler,
            told.decode(errors="replace")[-_MOST_TOLD:].strip() or error,
        )
        return None


def _built(compiler: str, folder: Path) -> Path:
    path = folder / f"decoder-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        library = Path(made) / path.name
        objects = [str(Path(made) / f"{suffix}.o") for suffix in SUFFIXES.values()]
        types = range(len(objects))
        with ThreadPoolExecutor(len(objects)) as pool:  # each takes seconds of one core
            list(pool.map(lambda type_: _compile(compiler, type_, objects[type_]), types))
        _run([compiler, "-shared", "-fopenmp", *objects, "-o", str(library), "-lm"])
        library.replace(path)
    return path


def _compile(compiler: str, type_: int, to: str) -> None:
    source = str(_SOURCES / _MAIN)
    _run([compiler, *_FLAGS, f"-DBF16={type_}", "-fPIC", "-c", source, "-o", to])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=300)  # noqa: S603


def _fingerprint(compiler: str) -> str:
    version = subprocess.run(  # noqa: S603
        [compiler, "--version"], check=True, capture_output=True, timeout=30
    ).stdout
    sources = [path.read_bytes() for path in sorted(_SOURCES.iterdir())]
    parts = [*sources, " ".join(_FLAGS).encode(), compiler.encode(), version, _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    named = [line for line in lines if line.startswith((b"model name", b"flags", b"Features"))]
    return b"\n".join(sorted(set(named)))
