"""Thousands of requests, generated from the server's own OpenAPI document."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Serve

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
    ),
]

LEAST = 5000


def test_no_generated_request_breaks_the_server(serve: Serve, tmp_path: Path) -> None:
    served = serve(
        batch_folder=tmp_path / "batches",
        profile_folder=tmp_path / "profiles",
        request_timeout=2.0,
    )
    # a deadline that the request itself sets may pass
    (tmp_path / "schemathesis.toml").write_text(
        '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]\n'
    )
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
        *("--checks", "not_a_server_error", "--max-examples", "300", "--request-timeout", "30"),
        *("--phases", "coverage,fuzzing", "--exclude-path-regex", "/(start|stop)_profile"),
        *("--continue-on-failure", "--suppress-health-check", "all"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    print(done.stdout[-4000:])
    count = re.search(r"(\d[\d,]*) generated", done.stdout)
    assert count is not None
    assert int(count[1].replace(",", "")) >= LEAST
    assert done.returncode == 0, done.stdout[-4000:]
    served.assert_idle()
