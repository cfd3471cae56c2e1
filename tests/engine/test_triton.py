"""Triton's kernels without a GPU: interpreted on the CPU, and compiled for GPUs.

Triton decides when it is first imported whether it interprets, so each has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from asyncsgl_engine.attention.triton_attention import Tiles, obstacle, splits_for, tiles_for
from asyncsgl_engine.config import ModelFacts

FOLDER = Path(__file__).parent
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_cases(file: str, names: str, folder: Path, interpreted: bool) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=100"]
    done = subprocess.run(
        [*command, str(FOLDER / file), "-k", names],
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER.parents[1],
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_TRITON
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "names",
    ["tokens_attend or tiles or one_kind or padding", "greedy or bfloat16_is or few_launches"],
)
def test_interpreted(names: str, tmp_path: Path) -> None:
    run_cases("triton_cases.py", names, tmp_path, interpreted=True)


@NEEDS_TRITON
@pytest.mark.timeout(120)
def test_compiled(tmp_path: Path) -> None:
    run_cases("triton_compiled.py", "compiles", tmp_path, interpreted=False)


def test_contexts_are_split_until_the_processors_are_busy() -> None:
    assert splits_for(rows=1, kv_heads=8, longest=100_000, tile=64, processors=132) == 32
    assert splits_for(rows=16, kv_heads=8, longest=100_000, tile=64, processors=132) == 2
    assert splits_for(rows=64, kv_heads=8, longest=100_000, tile=64, processors=132) == 1
    assert splits_for(rows=1, kv_heads=1, longest=100_000, tile=64, processors=132) == 64
    assert splits_for(rows=1, kv_heads=8, longest=130, tile=64, processors=132) == 2
    assert splits_for(rows=1, kv_heads=8, longest=1, tile=64, processors=132) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_are_powers_of_two_that_matrix_products_take(dtype: torch.dtype) -> None:
    for dim in (8, 64, 80, 128, 256):
        tiles: Tiles = tiles_for(dtype, dim)
        for size in (tiles.decode, tiles.lines, tiles.prefill):
            assert size >= 16
            assert size & (size - 1) == 0


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "reason"),
    [
        (torch.bfloat16, 128, (9, 0), None),
        (torch.float32, 80, (8, 0), None),
        (torch.float64, 128, (9, 0), "float64"),
        (torch.bfloat16, 320, (9, 0), "320"),
        (torch.float16, 128, (7, 5), "capability 8.0"),
    ],
)
@NEEDS_TRITON
def test_what_the_kernels_cannot_do_is_named(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], reason: str | None
) -> None:
    facts = ModelFacts("Some", 2, 8, 2, head_dim, 100, 100, "float32")
    found = obstacle(dtype, facts, capability)
    assert found is None if reason is None else found is not None and reason in found


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    facts = ModelFacts("Some", 2, 8, 2, 64, 100, 100, "float32")
    assert "asyncsgl[gpu]" in str(obstacle(torch.float32, facts, (9, 0)))
