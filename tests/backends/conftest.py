"""What the tests of providers' backends share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncsgl.backends import http_connect


@pytest.fixture(scope="session")
def one_certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one certificate: reading all that are trusted takes longer than a test."""
    certifi = pytest.importorskip("certifi")
    found = re.search(
        r"-----BEGIN.*?-----END CERTIFICATE-----\n", Path(certifi.where()).read_text(), re.DOTALL
    )
    assert found is not None
    path = tmp_path_factory.mktemp("certificates") / "one.pem"
    path.write_text(found[0])
    return path


@pytest.fixture(params=["httptools", "aiohttp", "httpx"])
def http_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each library that can do HTTP, as the one that is chosen."""
    library = str(request.param)
    pytest.importorskip(library)
    monkeypatch.setattr(http_connect, "_best", lambda _: library)
    return library


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch, one_certificate: Path) -> None:
    """Nothing of this machine's environment reaches the SDKs."""
    monkeypatch.setenv("SSL_CERT_FILE", str(one_certificate))
    # Google's library would look for certificates on the disk with every call
    monkeypatch.setenv("GOOGLE_API_USE_CLIENT_CERTIFICATE", "false")
    for name in (
        "OPENAI_API_KEY", "OPENAI_BASE_URL", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT",
        "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "GOOGLE_API_KEY",
        "GEMINI_API_KEY", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION",
        "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_GENAI_USE_ENTERPRISE", "GOOGLE_GEMINI_BASE_URL",
        "GOOGLE_VERTEX_BASE_URL", "GOOGLE_GENAI_API_VERSION", "GOOGLE_GENAI_HTTP_CLIENT",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
