"""The benchmark of starts starts what it says, and its parts add up."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from asyncsgl_engine.hub.cache import default_cache_root
from benchmarks.peers.contestant import Team
from benchmarks.startup import Start, begin, table
from tests.engine.conftest import save_model


@pytest.mark.parametrize("name", ["asyncsgl", "transformers"])
def test_a_start_is_the_sum_of_its_parts(name: str, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    asked = argparse.Namespace(dtype="float32", threads=1)
    team = Team(name, "starting", Path(sys.executable), str(model))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "native").symlink_to(default_cache_root() / "native")
    start = begin(team, asked, tmp_path / "cache")
    parts = (start.imports, start.load, start.first)
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(start.total)
    assert start.peak_mib > 50


def test_the_table_has_medians() -> None:
    starts = [Start(0.1, total - 0.2, 0.1, total, 300.0) for total in (1.0, 9.0, 2.0)]
    lines = table({"ours": starts, "a command": [Start(0, 0, 0, 3.0)]}).splitlines()
    assert lines[2] == "| ours | 0.10 | 1.80 | 0.10 | 2.00 | 1.00 to 9.00 | 300 |"
    assert lines[3] == "| a command |  |  |  | 3.00 | 3.00 to 3.00 |  |"
