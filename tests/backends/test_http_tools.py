"""The client that reads answers with httptools: what servers may say, and what they may not."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import pytest

pytest.importorskip("httptools")

from asyncsgl.backends import http_answer, http_dialer, http_pool
from asyncsgl.backends.http import Exchange, HTTPClient, HTTPSettings
from asyncsgl.backends.http_connect import connect
from asyncsgl.errors import (
    BackendConnectionError,
    BackendError,
    BackendTimeout,
    ClosedError,
    InvalidArgument,
)

from .wire import Served, Wire, served

pytestmark = pytest.mark.anyio

BODY = b'{"text": "x"}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def client_of(there: Served | str, **settings: object) -> HTTPClient:
    url = there if isinstance(there, str) else there.url
    return await connect(HTTPSettings(url, library="httptools", **settings))  # type: ignore[arg-type]


async def post(client: HTTPClient, path: str = "/x") -> tuple[int, bytes]:
    status, _, body = await client.ask("POST", path, BODY, Exchange())
    return status, body


def always(*pieces: bytes) -> Callable[[Wire], Awaitable[None]]:
    """Answer every request with the same packets."""

    async def handler(wire: Wire) -> None:
        while await wire.request():
            await wire.say(*pieces)

    return handler


def then_close(*pieces: bytes) -> Callable[[Wire], Awaitable[None]]:
    """Answer one request and close."""

    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.say(*pieces)

    return handler


def bytewise(answer: bytes) -> list[bytes]:
    return [answer[at : at + 1] for at in range(len(answer))]


CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nX-A: 1\r\nx-a: 2\r\n\r\n"
    b"3;name=value\r\nabc\r\n0A\r\n0123456789\r\n0\r\nX-Trailer: yes\r\n\r\n"
)


# -- what a server may say ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (OK, 200, b"ok"),
        (CHUNKED, 200, b"abc0123456789"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 304, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.1 599 \r\nContent-Length: 2\r\n\r\nno", 599, b"no"),
    ],
)
@pytest.mark.parametrize("split", [True, False])
async def test_whole_answers_and_the_connection_again(
    answer: bytes, status: int, body: bytes, split: bool
) -> None:
    async with served(always(*bytewise(answer) if split else [answer])) as there:
        client = await client_of(there)
        for _ in range(3):
            assert await post(client) == (status, body)
            async with client.open("POST", "/x", BODY, Exchange()) as response:
                assert response.status == status
                assert b"".join([chunk async for chunk in response.chunks()]) == body
            async with client.open("POST", "/x", BODY, Exchange()) as response:
                assert await response.read() == body
        assert there.accepted == 1
        await client.aclose()


async def test_headers_are_found_by_small_names_and_trailers_are_none() -> None:
    async with served(always(CHUNKED)) as there:
        client = await client_of(there)
        _, headers, _ = await client.ask("GET", "/x", None, Exchange())
        assert headers == {"transfer-encoding": "chunked", "x-a": "1, 2"}
        await client.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nall there is",
        b"HTTP/1.0 200 OK\r\n\r\nall there is",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nall there is",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 12\r\n\r\nall there is",
        b"HTTP/1.0 200 OK\r\nContent-Length: 12\r\n\r\nall there is",
    ],
)
async def test_answers_that_end_their_connection(answer: bytes) -> None:
    async with served(then_close(*bytewise(answer))) as there:
        client = await client_of(there)
        assert await post(client) == (200, b"all there is")
        async with client.open("POST", "/x", BODY, Exchange()) as response:
            assert b"".join([chunk async for chunk in response.chunks()]) == b"all there is"
        assert there.accepted == 2
        await there.until(lambda: there.open == 0)
        await client.aclose()


async def test_the_answer_to_head_has_no_body() -> None:
    async with served(always(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")) as there:
        client = await client_of(there)
        status, headers, body = await client.ask("HEAD", "/x", None, Exchange())
        assert (status, headers["content-length"], body) == (200, "5", b"")
        await client.aclose()


async def test_what_is_sent() -> None:
    heads: list[bytes] = []

    async def handler(wire: Wire) -> None:
        while head := await wire.request():
            heads.append(head)
            await wire.say(OK)

    async with served(handler) as there:
        client = await client_of(f"{there.url}/a b/é", headers={"Authorization": "Bearer k"})
        await client.ask("POST", "/x?y=1%20&z=2", BODY, Exchange())
        await client.ask("GET", "/x", None, Exchange())
        await client.ask("POST", "/x", None, Exchange())
        await client.aclose()
        place = there.url.removeprefix("http://").encode()
    posted, got, empty = heads
    assert posted.startswith(b"POST /a%20b/%C3%A9/x?y=1%20&z=2 HTTP/1.1\r\nHost: " + place)
    assert b"\r\nAuthorization: Bearer k\r\n" in posted
    assert b"\r\nContent-Length: 13\r\n" in posted
    assert b"content-" not in got.lower()
    assert b"\r\nContent-Length: 0\r\n" in empty


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "clé", "a\x00"])
def test_a_header_that_would_be_another_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        HTTPSettings("http://h", {"Authorization": value})
    assert value not in str(caught.value)


async def test_large_bodies_both_ways() -> None:
    """The server reads before it writes, and neither side holds all of it in a pipe."""
    size = 20 * 2**20

    async def handler(wire: Wire) -> None:
        while await wire.request():
            await wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, bytes(size))

    async with served(handler) as there:
        client = await client_of(there)
        for _ in range(2):
            status, _, body = await client.ask("POST", "/x", bytes(size), Exchange())
            assert (status, len(body)) == (200, size)
        assert there.accepted == 1
        await client.aclose()


async def test_an_answer_before_the_request_was_read_ends_the_connection() -> None:
    async def handler(wire: Wire) -> None:
        if wire.number:
            await always(OK)(wire)
        await wire.head()
        await wire.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await wire.gone()

    async with served(handler) as there:
        client = await client_of(there)
        status, _, body = await client.ask("POST", "/x", bytes(20 * 2**20), Exchange())
        assert (status, body) == (413, b"no")
        assert await post(client) == (200, b"ok")
        assert there.accepted == 2
        await client.aclose()


async def test_an_address_without_a_name() -> None:
    with pytest.raises(InvalidArgument, match="base_url"):
        await client_of("http://a..b")


# -- what it may not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"\x15\x03\x01 not http at all\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA\x00: b\r\n\r\n",
    ],
)
@pytest.mark.parametrize("split", [True, False])
async def test_malformed_answers(answer: bytes, split: bool) -> None:
    async with served(always(*bytewise(answer) if split else [answer])) as there:
        client = await client_of(there)
        with pytest.raises(BackendConnectionError, match=r"127.0.0.1.*not HTTP/1\.1") as caught:
            await post(client)
        assert caught.value.retryable
        await there.until(lambda: there.open == 0)
        await client.aclose()


async def test_a_change_of_protocol() -> None:
    switch = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\x00"
    async with served(always(switch)) as there:
        client = await client_of(there)
        with pytest.raises(BackendConnectionError, match="nobody asked for"):
            await post(client)
        await client.aclose()


LONG = [b"a" * 2**14] * 30  # more than comes in one go, and the limit


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 ", *LONG],
        [b"HTTP/1.1 200 OK\r\nX: ", *LONG],
        [b"HTTP/1.1 200 OK\r\n", *[b"X-%d: %s\r\n" % (n, b"y" * 1000) for n in range(100)]],
        [b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\nContent-Length: 2\r\n\r\nok"],
        [b"HTTP/1.1 103 E\r\nX: 1\r\n\r\n" * 4000],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", *LONG],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;", *LONG],
    ],
    ids=["status", "line", "lines", "in one packet", "interim", "trailer", "extension"],
)
async def test_heads_without_end(pieces: list[bytes]) -> None:
    async with served(then_close(*pieces)) as there:
        client = await client_of(there)
        with pytest.raises(BackendError, match="larger than 64 KiB") as caught:
            await post(client)
        assert not caught.value.retryable
        await there.until(lambda: there.open == 0)
        await client.aclose()


async def test_a_body_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_answer, "MOST_BODY", 1000)
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n"
    async with served(always(large, bytes(1500), bytes(500))) as there:
        client = await client_of(there)
        with pytest.raises(BackendError, match=r"larger than .* GiB") as caught:
            await post(client)
        assert not caught.value.retryable
        await there.until(lambda: there.open == 0)
        await client.aclose()


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([], "before it answered"),
        ([b"HTTP/1.1 200 OK\r\nContent-Le"], "before its answer was whole"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"four"], "before its answer was whole"),
        ([CHUNKED[:-20]], "before its answer was whole"),
    ],
)
async def test_a_close_before_the_end(pieces: list[bytes], said: str) -> None:
    async with served(then_close(*pieces)) as there:
        client = await client_of(there)
        for method in ("POST", "GET"):  # on a new connection nothing is tried again
            with pytest.raises(BackendConnectionError, match=said) as caught:
                await client.ask(method, "/x", None, Exchange())
            assert caught.value.retryable
        assert there.accepted == 2
        await client.aclose()


async def test_a_stream_gives_what_came_before_it_broke() -> None:
    async with served(then_close(CHUNKED[:-20])) as there:
        client = await client_of(there)
        come: list[bytes] = []
        async with client.open("POST", "/x", BODY, Exchange()) as response:
            with pytest.raises(BackendConnectionError, match="whole"):
                await kept(response.chunks(), come)
        assert b"".join(come).startswith(b"abc0123")
        await client.aclose()


async def kept(chunks: AsyncIterator[bytes], come: list[bytes]) -> None:
    async for chunk in chunks:
        come.append(chunk)  # noqa: PERF401 - what came before an error is kept


@pytest.mark.parametrize("more", [OK, b"garbage", b"HTTP/1.1 200 OK\r\nContent-Le"])
async def test_more_than_the_answer_ends_the_connection(more: bytes) -> None:
    """What follows an answer must not become the answer to the next request."""

    async def handler(wire: Wire) -> None:
        while await wire.request():
            number = b"%d" % wire.number
            await wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + number + more)

    async with served(handler) as there:
        client = await client_of(there)
        for number in range(3):
            assert await post(client) == (200, b"%d" % number)
        assert there.accepted == 3
        await client.aclose()


async def test_words_on_an_idle_connection_end_it() -> None:
    asked = asyncio.Event()

    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.say(OK)
        await asked.wait()
        await wire.say(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await wire.gone()

    async with served(handler) as there:
        client = await client_of(there)
        assert await post(client) == (200, b"ok")
        asked.set()
        await there.until(lambda: there.open == 0)
        assert await post(client) == (200, b"ok")
        assert there.accepted == 2
        await client.aclose()


# -- connections that were idle -------------------------------------------------------------------


@pytest.mark.parametrize(("method", "again"), [("GET", True), ("POST", False)])
async def test_an_idle_connection_that_is_closed_as_a_request_comes(
    method: str, again: bool
) -> None:
    asked: list[bytes] = []

    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.say(OK)
        asked.append(await wire.request())
        if wire.number:
            await wire.say(OK)

    async with served(handler) as there:
        client = await client_of(there)
        await post(client)
        exchange = Exchange()
        if again:
            assert (await client.ask(method, "/x", None, exchange))[2] == b"ok"
            assert there.accepted == 2
        else:
            with pytest.raises(BackendConnectionError, match="before it answered"):
                await client.ask(method, "/x", BODY, exchange)
            assert there.accepted == 1
            assert exchange.sent
        assert len(asked) == 1
        await client.aclose()


async def test_a_request_is_not_sent_again_once_something_came() -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.say(OK)
        await wire.request()
        await wire.say(b"HTTP/1.1 ")

    async with served(handler) as there:
        client = await client_of(there)
        await post(client)
        with pytest.raises(BackendConnectionError, match="whole"):
            await client.ask("GET", "/x", None, Exchange())
        assert there.accepted == 1
        await client.aclose()


async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_pool, "KEEPALIVE", 0.1)
    async with served(always(OK)) as there:
        client = await client_of(there)
        await asyncio.gather(*(post(client) for _ in range(5)))
        assert there.open == 5
        await there.until(lambda: there.open == 0)
        assert await post(client) == (200, b"ok")
        await client.aclose()


# -- silence ----------------------------------------------------------------------------------------


async def test_slow_bytes_are_no_silence() -> None:
    async def handler(wire: Wire) -> None:
        while await wire.request():
            for piece in bytewise(OK):
                await wire.say(piece)
                await asyncio.sleep(0.01)

    async with served(handler) as there:
        client = await client_of(there, timeout=0.2)  # the answer takes more than 0.4 seconds
        assert await post(client) == (200, b"ok")
        await client.aclose()


async def test_silence_in_the_middle_and_after_many_exchanges() -> None:
    async def handler(wire: Wire) -> None:
        for _ in range(3):
            await wire.request()
            await wire.say(OK)
        await wire.request()
        await wire.say(OK[:-1])
        await wire.gone()

    async with served(handler) as there:
        client = await client_of(there, timeout=0.1)
        for _ in range(3):
            await post(client)
        with pytest.raises(BackendTimeout, match=r"silent for more than 0\.1 seconds"):
            await post(client)
        await there.until(lambda: there.open == 0)
        await client.aclose()


async def test_a_slow_reader_holds_the_server_back_and_is_not_its_silence() -> None:
    sent = 0
    size, pieces = 2**16, 1024

    async def handler(wire: Wire) -> None:
        nonlocal sent
        await wire.request()
        await wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (size * pieces))
        for _ in range(pieces):
            wire.writer.write(bytes(size))
            await wire.writer.drain()
            sent += 1
        await wire.gone()

    async with served(handler) as there:
        client = await client_of(there, timeout=0.2)
        come = 0
        async with client.open("POST", "/x", BODY, Exchange()) as response:
            chunks = response.chunks()
            come += len(await anext(chunks))
            await asyncio.sleep(0.5)
            assert sent < pieces / 2  # what lies in the system's pipes
            async for chunk in chunks:
                come += len(chunk)
        assert come == size * pieces
        await client.aclose()


async def test_a_server_that_accepts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_dialer, "CONNECT_TIMEOUT", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            with suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        client = await client_of(f"http://127.0.0.1:{listener.getsockname()[1]}", max_connections=1)
        for _ in range(2):  # the place is free again
            exchange = Exchange()
            with pytest.raises(BackendTimeout, match="no connection within"):
                await client.ask("POST", "/x", BODY, exchange)
            assert not exchange.sent
        await client.aclose()
        for filler in fillers:
            filler.close()


# -- the pool -----------------------------------------------------------------------------------------


async def test_who_came_first_is_served_first() -> None:
    heads: list[bytes] = []

    async def handler(wire: Wire) -> None:
        while head := await wire.request():
            heads.append(head.split()[1])
            await wire.say(OK)

    async with served(handler) as there:
        client = await client_of(there, max_connections=1)
        await asyncio.gather(*(post(client, f"/{number}") for number in range(50)))
        assert heads == [b"/%d" % number for number in range(50)]
        assert there.accepted == 1
        await client.aclose()


async def test_failed_connections_leave_their_place() -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
    client = await client_of(url, max_connections=2)
    asks = (post(client) for _ in range(20))
    failed = await asyncio.gather(*asks, return_exceptions=True)
    assert all(isinstance(error, BackendConnectionError) for error in failed)
    await client.aclose()


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_in_any_turn_of_the_loop(turns: int) -> None:
    """With one connection: whoever is cancelled when, the next one gets its turn."""
    async with served(always(OK)) as there:
        client = await client_of(there, max_connections=1)
        for warm in (False, True):
            tasks = [asyncio.ensure_future(post(client)) for _ in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[:3]:
                task.cancel()
            assert await tasks[3] == (200, b"ok"), warm
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in done} <= {asyncio.CancelledError, tuple}
        await client.aclose()
        await there.until(lambda: there.open == 0)


@pytest.mark.timeout(60)
async def test_a_storm_of_cancellations_leaves_nothing() -> None:
    seed = random.Random(7)
    most = 0

    async def handler(wire: Wire) -> None:
        nonlocal most
        while await wire.request():
            most = max(most, there.open)
            for _ in range(seed.randrange(4)):
                await asyncio.sleep(0)
            await wire.say(OK[:20], OK[20:])

    async with served(handler) as there:
        client = await client_of(there, max_connections=50)
        before = len(asyncio.all_tasks())
        for _ in range(10):
            tasks = [asyncio.ensure_future(post(client)) for _ in range(300)]
            for task in seed.sample(tasks, 250):
                if seed.random() < 0.2:
                    await asyncio.sleep(0)
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in done} <= {asyncio.CancelledError, tuple}
        answers = await asyncio.gather(*(post(client) for _ in range(500)))
        assert set(answers) == {(200, b"ok")}
        await client.aclose()
        await there.until(lambda: there.open == 0)
        assert len(asyncio.all_tasks()) <= before
    assert most <= 100  # a server may hear late of those that were closed


@pytest.mark.timeout(60)
async def test_thousands_at_once() -> None:
    async with served(always(OK)) as there:
        client = await client_of(there, max_connections=400)
        answers = await asyncio.gather(*(post(client) for _ in range(5000)))
        assert set(answers) == {(200, b"ok")}
        assert there.accepted == 400
        await client.aclose()
        await there.until(lambda: there.open == 0)


async def test_streams_that_are_left_close_their_connection() -> None:
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 3
    async with served(always(endless)) as there:
        client = await client_of(there, max_connections=1)
        for _ in range(3):
            async with client.open("POST", "/x", BODY, Exchange()) as response:
                assert await anext(response.chunks()) == b"aaa"
        await there.until(lambda: there.open == 0)
        assert there.accepted == 3
        await client.aclose()


async def test_closing_ends_what_is_under_way_and_who_waits() -> None:
    async with served(then_silent) as there:
        client = await client_of(there, max_connections=1)
        tasks = [asyncio.ensure_future(post(client)) for _ in range(3)]
        await there.until(lambda: there.accepted == 1)
        await client.aclose()
        for task in tasks:
            with pytest.raises(ClosedError):
                await task
        await there.until(lambda: there.open == 0)
        with pytest.raises(ClosedError):
            await post(client)


@pytest.mark.parametrize("turns", range(8))
async def test_closed_while_it_connects(turns: int) -> None:
    async with served(then_close(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok")) as there:
        client = await client_of(there)
        assert await post(client) == (200, b"ok")  # the address is known from now on
        await there.until(lambda: there.open == 0)
        task = asyncio.ensure_future(post(client))
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.aclose()
        with suppress(ClosedError):
            assert await task == (200, b"ok")
        await there.until(lambda: there.open == 0)
        assert there.accepted <= 2
        with pytest.raises(ClosedError):
            await post(client)


async def then_silent(wire: Wire) -> None:
    await wire.request()
    await wire.gone()


# -- https ----------------------------------------------------------------------------------------------


@pytest.fixture
def certified() -> ssl.SSLContext:
    trustme = pytest.importorskip("trustme")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_https_in_all_sizes(certified: ssl.SSLContext) -> None:
    size = 5 * 2**20

    async def handler(wire: Wire) -> None:
        while await wire.request():
            await wire.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, bytes(size))

    async with served(handler, certified) as there:
        client = await client_of(there, verify=False)
        for body in (BODY, bytes(size)):
            assert len((await client.ask("POST", "/x", body, Exchange()))[2]) == size
        async with client.open("POST", "/x", BODY, Exchange()) as response:
            come = 0
            async for chunk in response.chunks():
                come += len(chunk)
                await asyncio.sleep(0)
        assert (come, there.accepted) == (size, 1)
        await client.aclose()
        await there.until(lambda: there.open == 0)


async def test_https_that_is_left(certified: ssl.SSLContext) -> None:
    async with served(then_silent, certified) as there:
        client = await client_of(there, verify=False, timeout=0.2, max_connections=2)
        tasks = [asyncio.ensure_future(post(client)) for _ in range(10)]
        await there.until(lambda: there.accepted == 2)
        for task in tasks[1:]:
            task.cancel()
        with pytest.raises(BackendTimeout, match="silent"):
            await tasks[0]
        await asyncio.gather(*tasks, return_exceptions=True)
        await there.until(lambda: there.open == 0)
        await client.aclose()


async def test_a_handshake_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_dialer, "CONNECT_TIMEOUT", 0.1)

    async def handler(wire: Wire) -> None:
        await wire.gone()

    async with served(handler) as there:
        url = there.url.replace("http:", "https:")
        client = await client_of(url, verify=False, max_connections=1)
        waits = asyncio.ensure_future(post(client))
        await there.until(lambda: there.open == 1)
        waits.cancel()  # in the middle of it
        for _ in range(2):
            with pytest.raises(BackendTimeout, match="no connection within"):
                await post(client)
        await there.until(lambda: there.open == 0)
        await client.aclose()


# -- which library ------------------------------------------------------------------------------------


async def test_behind_a_proxy_another_library_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(client: HTTPClient) -> str:
        return type(client).__module__.rpartition("_")[2]

    for name in ("http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    direct = await connect(HTTPSettings("http://far.example"))
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    behind = await connect(HTTPSettings("http://far.example"))
    assert (kind(direct), kind(behind) in ("aiohttp", "httpx")) == ("tools", True)
    with pytest.raises(InvalidArgument, match="proxies"):
        await connect(HTTPSettings("http://far.example", library="httptools"))
    await direct.aclose()
    await behind.aclose()
