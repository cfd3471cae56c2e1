"""HTTP is the same over every library."""

from __future__ import annotations

import asyncio
import ssl

import pytest

from asyncsgl.backends.http import Exchange, HTTPClient, HTTPSettings, split_user_info
from asyncsgl.backends.http_connect import connect
from asyncsgl.errors import (
    BackendConnectionError,
    BackendTimeout,
    ClosedError,
    InvalidArgument,
)
from asyncsgl.testing_server import Drop, FakeServer, Hang

pytestmark = pytest.mark.anyio

BODY = b'{"text": "x"}'


@pytest.fixture(params=["httptools", "aiohttp", "httpx"])
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


async def client_of(server: FakeServer, library: str, **settings: object) -> HTTPClient:
    made = HTTPSettings(server.url, library=library, **settings)  # type: ignore[arg-type]
    return await connect(made)


async def test_an_answer(library: str) -> None:
    async with FakeServer("hello") as server:
        client = await client_of(server, library, headers={"Authorization": "Bearer k"})
        exchange = Exchange()
        status, headers, body = await client.ask("POST", "/generate", BODY, exchange)
        await client.ask("GET", "/model_info", None, Exchange())
        await client.aclose()
    assert (status, headers["content-type"], exchange.sent) == (200, "application/json", True)
    assert b"hello" in body
    [posted, got] = server.requests
    assert posted.headers["authorization"] == "Bearer k"
    assert posted.headers["content-type"] == "application/json"
    assert posted.headers["accept-encoding"] == "identity"
    assert posted.body == BODY
    assert got.method == "GET"
    assert posted.peer == got.peer  # one connection


async def test_a_stream_and_its_connection_again(library: str) -> None:
    async with FakeServer("a b c") as server:
        client = await client_of(server, library)
        for _ in range(2):
            body = b'{"text": "x", "stream": true}'
            async with client.open("POST", "/generate", body, Exchange()) as response:
                assert response.status == 200
                whole = b"".join([chunk async for chunk in response.chunks()])
            assert whole.endswith(b"data: [DONE]\n\n")
        assert server.accepted == 1
        await client.aclose()


async def test_cancelling_closes_the_connection(library: str) -> None:
    async with FakeServer(faults=[Hang(), Hang(after=0)]) as server:
        client = await client_of(server, library)
        for body in (BODY, b'{"text": "x", "stream": true}'):
            exchange = Exchange()
            task = asyncio.ensure_future(client.ask("POST", "/generate", body, exchange))
            await server.until(lambda: server.running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert exchange.sent
            await server.until(lambda: server.connections == 0)
        assert (await client.ask("POST", "/generate", BODY, Exchange()))[0] == 200
        await client.aclose()


async def test_silence_is_a_timeout(library: str) -> None:
    async with FakeServer(faults=[Hang()]) as server:
        client = await client_of(server, library, timeout=0.1)
        with pytest.raises(BackendTimeout, match=r"silent for more than 0\.1 seconds"):
            await client.ask("POST", "/generate", BODY, Exchange())
        await server.until(lambda: server.connections == 0)
        await client.aclose()


async def test_broken_and_missing_connections(library: str) -> None:
    async with FakeServer(faults=[Drop()]) as server:
        client = await client_of(server, library)
        with pytest.raises(BackendConnectionError, match=r"127\.0\.0\.1"):
            await client.ask("POST", "/generate", BODY, Exchange())
    exchange = Exchange()
    with pytest.raises(BackendConnectionError) as caught:
        await client.ask("POST", "/generate", BODY, exchange)
    assert caught.value.retryable
    assert not exchange.sent
    await client.aclose()


async def test_requests_wait_for_a_connection(library: str) -> None:
    async with FakeServer("x", first_delay=0.02) as server:
        client = await client_of(server, library, max_connections=3, timeout=0.1)
        asks = [client.ask("POST", "/generate", BODY, Exchange()) for _ in range(30)]
        answers = await asyncio.gather(*asks)
        assert [status for status, _, _ in answers] == [200] * 30
        assert server.accepted == 3
        await client.aclose()


async def test_idle_connections_of_a_server_are_not_used(library: str) -> None:
    async with FakeServer("x", idle=0.02) as server:
        client = await client_of(server, library)
        for _ in range(3):
            assert (await client.ask("POST", "/generate", BODY, Exchange()))[0] == 200
            await server.until(lambda: server.connections == 0)
        await client.aclose()


async def test_a_certificate_that_is_not_trusted_is_final(library: str) -> None:
    trustme = pytest.importorskip("trustme")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with FakeServer("x", context=context) as server:
        client = await client_of(server, library)
        with pytest.raises(BackendConnectionError, match="certificate") as caught:
            await client.ask("POST", "/generate", BODY, Exchange())
        assert not caught.value.retryable
        await client.aclose()
        trusting = await client_of(server, library, verify=False)
        assert (await trusting.ask("POST", "/generate", BODY, Exchange()))[0] == 200
        await trusting.aclose()


async def test_a_closed_client_says_so(library: str) -> None:
    async with FakeServer("x") as server:
        client = await client_of(server, library)
        await client.aclose()
        await client.aclose()
        with pytest.raises(ClosedError):
            await client.ask("POST", "/generate", BODY, Exchange())


async def test_redirects_are_not_followed(library: str) -> None:
    """A key must not travel to where a server points."""
    from asyncsgl.testing_server import Refuse

    there = Refuse(307, "", {"Location": "http://127.0.0.1:9/generate"})
    async with FakeServer("x", faults=[there]) as server:
        client = await client_of(server, library)
        status, _, _ = await client.ask("POST", "/generate", BODY, Exchange())
        assert status == 307
        await client.aclose()


def test_the_environment_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert HTTPSettings("http://far.example").proxy == "http://proxy:3128"
    assert HTTPSettings("https://far.example").proxy is None
    assert HTTPSettings("http://127.0.0.1:30000").proxy is None


def test_addresses() -> None:
    assert split_user_info("http://h:1/") == ("http://h:1", None)
    assert split_user_info("https://a:b@h/x/y/") == ("https://h/x/y", "a:b")
    with pytest.raises(InvalidArgument) as caught:
        split_user_info("ftp://ann:secret@h")
    assert "secret" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(HTTPSettings("http://h", {"Authorization": "Bearer secret"}))
