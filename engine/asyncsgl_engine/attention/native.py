"""Decoding attention in C, compiled once on this machine; prefill stays with PyTorch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from .base import LayerCall, StepContext
from .torch_cpu import attend_spans

__all__ = ["NativeAttention", "build_native"]

_SOURCE = Path(__file__).with_name("decode.c")
# The parts of -ffast-math that let sums be vectorised. Not the whole: it would make the linker
# add start-up code that flushes denormal numbers to zero in every thread that loads the library.
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fassociative-math", "-freciprocal-math"),
    *("-fno-math-errno", "-fno-signed-zeros", "-fno-trapping-math"),
)
_MOST_GROUP, _MOST_DIM = 16, 256
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Step(ctypes.Structure):
    """The C side's `Step`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "keys", "values", "out")),
        *((name, ctypes.c_void_p) for name in ("write_slots", "table", "lengths")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("tokens", "rows", "heads", "kv_heads", "dim", "page_size", "table_width"),
                *("window", "query_row", "query_head", "key_row", "key_head"),
                *("value_row", "value_head"),
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class NativeAttention:
    """Reads keys and values where they lie, page by page: nothing is gathered or padded.

    Args:
        library: what `build_native` gave.
    """

    needs_slots = False
    needs_tables = False
    skips_padding = False

    def __init__(self, library: ctypes.CDLL) -> None:
        self._steps = {
            dtype: getattr(library, f"asyncsgl_step_{suffix}")
            for dtype, suffix in _SUFFIXES.items()
        }

    @staticmethod
    def takes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
        """Whether a model of these sizes fits the compiled code."""
        return dtype in _SUFFIXES and heads // kv_heads <= _MOST_GROUP and head_dim <= _MOST_DIM

    def attend(self, call: LayerCall, context: StepContext) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        batch = context.batch
        tokens, heads, dim = call.query.shape
        query, key, value = (_dense(part) for part in (call.query, call.key, call.value))
        out = torch.empty((tokens, heads, dim), dtype=query.dtype)
        step = _Step(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            context.cache.keys[call.layer].data_ptr(),
            context.cache.values[call.layer].data_ptr(),
            out.data_ptr(),
            batch.write_slots.data_ptr(),
            batch.page_table.data_ptr(),
            batch.single_lengths.data_ptr(),
            tokens,
            batch.singles,
            heads,
            key.shape[1],
            dim,
            context.cache.page_size,
            batch.page_table.shape[1],
            call.window or 0,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            call.scale,
            call.softcap or 0.0,
        )
        self._steps[query.dtype](ctypes.byref(step))
        attend_spans(call, context, out)
        return out


def build_native(folder: Path) -> ctypes.CDLL | None:
    """Compile the C code, or find it compiled; None where that cannot be done.

    Args:
        folder: where the library is kept, under a name that tells source, flags, compiler and
            processor apart; made when first needed.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.name != "posix":
        return None
    try:
        path = _built(compiler, folder)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(compiler: str, folder: Path) -> Path:
    path = folder / f"decode-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        library = Path(made) / path.name
        command = [compiler, *_FLAGS, "-shared", "-fPIC", str(_SOURCE), "-o", str(library), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603
        library.replace(path)
    return path


def _fingerprint(compiler: str) -> str:
    version = subprocess.run(  # noqa: S603
        [compiler, "--version"], check=True, capture_output=True, timeout=30
    ).stdout
    parts = [_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    named = [line for line in lines if line.startswith((b"model name", b"flags", b"Features"))]
    return b"\n".join(sorted(set(named)))


def _dense(part: torch.Tensor) -> torch.Tensor:
    """With its elements of one head beside each other."""
    return part if part.stride(2) == 1 else part.contiguous()
