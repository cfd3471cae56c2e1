"""What a request may make the server read."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from asyncsgl_engine.errors import InvalidRequest
from asyncsgl_engine.server import ServerSettings
from asyncsgl_engine.server.media import MediaReader, is_public

pytestmark = pytest.mark.anyio


def reader(anywhere: bool = False, **settings: Any) -> MediaReader:
    made = ServerSettings(**settings)
    return MediaReader(made, lambda _: True) if anywhere else MediaReader(made)


async def refusal(media: MediaReader, source: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await media.read(source)
    return caught.value.problem


async def test_inline_images_are_always_read() -> None:
    data = base64.b64encode(b"bytes").decode()
    assert await reader().read(f"data:image/png;base64,{data}") == b"bytes"
    assert await reader().read(data) == b"bytes"
    assert "more than 4 bytes" in await refusal(reader(max_media_bytes=4), data * 3)
    assert "neither base64" in await refusal(reader(), "not base64!")
    assert ";base64," in await refusal(reader(), "data:image/png,abc")


async def test_files_are_read_below_the_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (folder / "link").symlink_to(tmp_path / "secret")
    allowed = reader(allow_local_media=folder)
    assert await allowed.read(str(folder / "a.png")) == b"inside"
    assert await allowed.read(f"file://{folder}/a.png") == b"inside"
    assert await allowed.read("./a.png") == b"inside"
    for name in ("/etc/passwd", "../secret", str(folder / "link"), f"file://{tmp_path}/secret"):
        assert "no such file" in await refusal(allowed, name)
    assert "reads no files" in await refusal(reader(), f"file://{folder}/a.png")
    assert "neither base64" in await refusal(reader(), "/etc/passwd")
    small = reader(allow_local_media=folder, max_media_bytes=3)
    assert "more than 3 bytes" in await refusal(small, "./a.png")


@pytest.fixture
async def site() -> AsyncIterator[str]:
    """A web server that redirects from any path but /image to the path that follows it."""

    async def answer(reads: asyncio.StreamReader, writes: asyncio.StreamWriter) -> None:
        path = (await reads.readline()).split()[1].decode()
        while await reads.readline() != b"\r\n":
            pass
        if path == "/image":
            writes.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nbytes")
        else:
            to = path.removeprefix("/to/")
            writes.write(f"HTTP/1.1 302 Found\r\nlocation: {to}\r\n\r\n".encode())
        writes.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://localhost:{server.sockets[0].getsockname()[1]}"


async def test_urls_are_fetched_from_allowed_hosts_only(site: str) -> None:
    allowed = reader(anywhere=True, allow_media_domains=("localhost",))
    assert await allowed.read(f"{site}/image") == b"bytes"
    assert await allowed.read(f"{site}/to//image") == b"bytes"
    assert "fetches nothing from localhost" in await refusal(reader(), f"{site}/image")
    elsewhere = f"{site}/to/http://169.254.169.254/latest"
    assert "fetches nothing from 169.254.169.254" in await refusal(allowed, elsewhere)
    assert "redirects more than" in await refusal(allowed, f"{site}/to/{'/to/' * 5}/image")
    small = reader(anywhere=True, allow_media_domains=("localhost",), max_media_bytes=4)
    assert "more than 4 bytes" in await refusal(small, f"{site}/image")


async def test_an_allowed_host_may_not_be_in_this_network(site: str) -> None:
    allowed = reader(allow_media_domains=("localhost",))
    assert "not on the open internet" in await refusal(allowed, f"{site}/image")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("fe80::1", False),
        ("fc00::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public
