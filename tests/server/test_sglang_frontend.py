"""SGLang's own frontend as a client of this server, where that package is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Served

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="sglang is not installed"
)


def test_sglangs_own_frontend_runs_programs_on_this_server(served: Served) -> None:
    script = Path(__file__).with_name("sglang_program.py")
    done = subprocess.run(
        [sys.executable, str(script), served.url], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    came = json.loads(done.stdout.splitlines()[-1])
    text = served.generate()["text"]
    assert came["text"] == "".join(came["pieces"]) == text
    assert came["batch"] == [text] * 3
    assert came["finish"] == {"type": "length", "length": 8}
    assert came["colour"] in ("red", "blue")
    assert came["number"].strip().lstrip("+-").isdecimal()
