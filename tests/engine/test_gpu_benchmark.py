"""The harness of `benchmarks/gpu.py`; what it measures needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'engine'}"},
    )


@pytest.mark.timeout(120)
def test_every_figure_is_made_on_a_cpu_too(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = run("--device", "cpu", "--tiny", "--no-peer", "--json", str(path))
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}
    assert list(figures) == [
        "copy",
        "matrix product, bfloat16",
        "decode, batch 1",
        "decode, batch 3",
        "prefill, 64 tokens",
        "A, engine",
        "B, engine",
    ]
    assert all(figure["value"] > 0 for figure in figures.values())


@pytest.mark.timeout(60)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so() -> None:
    done = run()
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr
