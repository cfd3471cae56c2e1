"""Runs the app on a socket: from the ready line to the drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Future
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError
from .app import service_of
from .connections import Connection
from .settings import Address

__all__ = ["BackgroundServer", "bind", "serve"]

KEEP_ALIVE_S = 60
"""Longer than what clients keep idle connections for, so that they do not meet a reset."""
BACKLOG = 2048


def bind(address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is in use or cannot be used.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # asyncio turns off Nagle's algorithm only where the protocol is named; with it a small piece
    # of an answer waits up to 40 ms for the client to acknowledge the one before
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        where = f"{address.host} port {address.port}"
        raise ConfigError(
            f"port: cannot serve on {where}: {error}; choose another port, or 0 for a free one"
        ) from error
    return sock


def url_of(sock: socket.socket) -> str:
    """The address of a listening socket, as clients on this machine write it."""
    name, port = sock.getsockname()[:2]
    any_interface = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - it is read, not bound
    host = any_interface.get(name) or str(name)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn that leaves signals to us and tells when it answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self.answering.set()

    @contextlib.asynccontextmanager
    async def on(self, sock: socket.socket) -> AsyncGenerator[asyncio.Future[None], None]:
        """Serve on a socket inside the block, which gets a future that ends with the server."""
        task = asyncio.ensure_future(self.serve(sockets=[sock]))
        try:
            await _first_of(self.answering.wait(), task)
            yield task
        finally:
            self.should_exit = True
            await task


def _server(app: FastAPI, log_level: str) -> _Server:
    config = uvicorn.Config(
        app,
        http=Connection,
        log_level=log_level,
        access_log=log_level in ("info", "debug"),
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        lifespan="off",  # the service's life is ours to run
        server_header=False,
        ws="none",
    )
    return _Server(config)


async def _first_of(work: Awaitable[object], *others: asyncio.Future[Any]) -> bool:
    """Wait for `work` or for one of the others; whether it was `work`, which is ended."""
    task: asyncio.Future[Any] = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, *others), return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        task.cancel()


async def serve(
    app: FastAPI,
    sock: socket.socket,
    *,
    log_level: str = "info",
    drain_limit: float = 30.0,
    ready: Callable[[str], None] | None = None,
) -> int:
    """Start the engine and serve until SIGTERM or SIGINT; in the main thread.

    Requests that come while the model loads are answered with 503. The first signal refuses
    new requests and waits for those that run; the second ends at once.

    Args:
        app: of `create_app`.
        sock: listening.
        log_level: of uvicorn's log.
        drain_limit: seconds that running requests get.
        ready: told the URL once requests are answered.

    Returns:
        The exit status: 0, or 130 after a second signal.

    Raises:
        EngineError: the engine cannot be started.
    """
    service = service_of(app)
    server = _server(app, log_level)
    with _signals() as signals:
        async with server.on(sock) as ended:
            starting = asyncio.ensure_future(service.start())
            if await _first_of(signals.get(), starting, ended):
                starting.cancel()
                return 0
            await starting
            async with service.running():
                _forget_what_stays()
                if ready is not None:
                    ready(url_of(sock))
                await _first_of(signals.get(), ended)
                drained = asyncio.ensure_future(service.drained(drain_limit))
                server.force_exit = await _first_of(signals.get(), drained, ended)
                drained.cancel()
    return 130 if server.force_exit else 0


def _forget_what_stays() -> None:
    """Keep the garbage collector off what was loaded: a walk over it stops everything."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _signals() -> Generator[asyncio.Queue[int], None, None]:
    """The signals that ask this process to end."""
    came: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, came.put_nowait, number)
    try:
        yield came
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class BackgroundServer:
    """Serves from a thread of its own, in a program that does other things.

    Args:
        app: of `create_app`.
        address: where.
    """

    def __init__(self, app: FastAPI, address: Address) -> None:
        self._app = app
        self._address = address
        self._server = _server(app, address.log_level)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._begun: Future[str] | None = None
        self.url: str | None = None

    async def start(self) -> str:
        """Bind the socket and wait until requests are answered; once, for all who call.

        Returns:
            The URL.

        Raises:
            ConfigError: the address is in use or cannot be used; start may be tried again.
            EngineError: the engine cannot be started.
        """
        with self._lock:
            begun = self._begun
            if begun is None:
                sock = bind(self._address)
                begun = self._begun = Future()
                self._thread = threading.Thread(
                    target=self._main, args=(sock, begun), name="asyncsgl-server", daemon=True
                )
                self._thread.start()
        url = await asyncio.shield(asyncio.wrap_future(begun))
        self.url = url
        return url

    def stop(self) -> None:
        """End the server and wait for its thread; what runs is cut off. Repeatable."""
        self._server.should_exit = True
        self._server.force_exit = True
        self.url = None
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _main(self, sock: socket.socket, begun: Future[str]) -> None:
        try:
            asyncio.run(self._serve(sock, begun))
        except Exception as error:  # noqa: BLE001 - handed to the caller of start
            if not begun.done():
                begun.set_exception(error)
        finally:
            sock.close()

    async def _serve(self, sock: socket.socket, begun: Future[str]) -> None:
        async with service_of(self._app).running(), self._server.on(sock) as ended:
            begun.set_result(url_of(sock))
            await ended
