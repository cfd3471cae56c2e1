"""A rank other than 0: loads its part of the model and computes the plans it is sent.

Started by `Ranks` as `python -m asyncsgl_engine.parallel.worker DESCRIPTOR PARENT`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import NoReturn

__all__ = ["main"]

_LOOK_MS = 1000


def main(descriptor: int, parent: int) -> None:
    """Serve until the other side of the socket is closed, which ends this process.

    Args:
        descriptor: of the socket to rank 0.
        parent: rank 0's process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with, args=(sock, parent), daemon=True).start()
    # Imported after the watch has begun, since it takes seconds.
    from .wire import Kind, send

    try:
        from .follower import follow

        follow(sock)
    except Exception as error:  # noqa: BLE001 - told to rank 0
        with suppress(OSError):  # it may be gone, which is why this failed
            send(sock, Kind.FAILED, f"{type(error).__name__}: {error}".encode())
        _leave(1)
    _leave(0)


def _end_with(sock: socket.socket, parent: int) -> None:
    """End this process when rank 0's is gone, whatever else it is doing.

    A process that rank 0 forked may hold the socket open beyond rank 0's end, so its identifier
    is looked at as well.
    """
    poll = select.poll()
    poll.register(sock, select.POLLHUP | getattr(select, "POLLRDHUP", 0))
    while not poll.poll(_LOOK_MS):
        if os.getppid() != parent:
            break
    _leave(0)


def _leave(status: int) -> NoReturn:
    """Without waiting for threads and devices, which may wait for rank 0 for ever."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
