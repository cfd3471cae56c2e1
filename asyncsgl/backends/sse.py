"""Server-sent events from bytes that are cut anywhere."""

from __future__ import annotations

from ..errors import BackendError

__all__ = ["DONE", "EventParser"]

DONE = b"[DONE]"
"""The data of the event that ends a stream of a model's server."""

MOST_BYTES = 256 * 2**20


class EventParser:
    """Takes the bytes of an event stream and gives the data of its events.

    A line ends with LF or CRLF, an event with an empty line. Lines of other fields and
    comments are passed over. What follows the last empty line is no event.
    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    __slots__ = ("_data", "_size", "_tail")

    def __init__(self) -> None:
        self._tail: list[bytes] = []
        self._size = 0
        self._data: list[bytes] = []

    def push(self, chunk: bytes) -> list[bytes]:
        """The data of the events that ``chunk`` completes.

        Raises:
            BackendError: an event is larger than 256 MiB.
        """
        if b"\n" not in chunk:
            self._tail.append(chunk)
            self._count(len(chunk))
            return []
        if self._tail:
            chunk = b"".join((*self._tail, chunk))
        lines = chunk.split(b"\n")
        last = lines.pop()
        self._tail = [last] if last else []
        events: list[bytes] = []
        for line in lines:
            self._line(line.removesuffix(b"\r"), events)
        self._size = len(last) + sum(map(len, self._data))
        return events

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data = []
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))

    def _count(self, more: int) -> None:
        self._size += more
        if self._size > MOST_BYTES:
            raise BackendError(f"an event of the stream is larger than {MOST_BYTES} bytes")
