"""The page at `/`, in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from .conftest import Serve, Served

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
LONG = {"max_new_tokens": 400, "ignore_eos": True}

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium to look at the page with"),
    pytest.mark.timeout(120),
]


def seen(url: str, profile: Path) -> str:
    """The page's elements after it ran for some seconds of the browser's time."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=4000",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout


def test_the_page_shows_what_happened(served: Served, tmp_path: Path) -> None:
    served.generate(["Once upon", "The sea"], sampling_params=LONG)
    marked = served.post("/generate", text="x", lora_path="<b>bold</b>")
    assert marked.status_code == 400
    while not any(moment["tokens_per_second"] for moment in moments(served)):
        pass
    page = seen(served.url, tmp_path)
    assert '<span id="model">tiny</span>' in page
    assert 'data-state="ready">ready</span>' in page
    assert re.search(r"\d+ answered, \d+ aborted, \d+ failed", page)
    for chart in ("requests", "speed", "hits", "pages"):
        part = page[page.index(f'<section id="{chart}">') :]
        points = re.search(r'<polyline[^>]* points="([^"]*)"', part[: part.index("</section>")])
        assert points is not None
        assert len(points[1].split()) >= 1
    errors = page[page.index('id="errors"') :]
    assert "POST /generate" in errors
    assert "lora_path is not supported" in errors


def moments(served: Served) -> list[dict[str, float]]:
    """What the page is drawn from."""
    found: list[dict[str, float]] = served.get("/v1/history").json()["moments"]
    return found


def test_the_page_asks_for_the_key(serve: Serve, tmp_path: Path) -> None:
    served = serve(api_key="k")
    page = seen(served.url, tmp_path)
    assert '<form id="keys">' in page
    assert "a key is asked for" in page
    history = httpx.get(f"{served.url}/v1/history", headers={"Authorization": "Bearer k"}).json()
    assert [error["status"] for error in history["errors"]] == [401]  # it does not go on asking


def test_the_page_loads_nothing_from_elsewhere(served: Served) -> None:
    response = served.get("/")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", response.text)
