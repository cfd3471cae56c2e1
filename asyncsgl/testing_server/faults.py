"""What can go wrong with one answer of the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Abort", "Cut", "Drop", "Fault", "Hang", "Refuse", "Say", "StreamError"]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Another status than 200.

    Args:
        status: of the answer.
        body: an object is sent as JSON, a text as it is.
        headers: such as ``{"Retry-After": "1"}``.
    """

    status: int
    body: object = ""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def content(self) -> bytes:
        """The body's bytes."""
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


@dataclass(frozen=True, slots=True)
class Abort:
    """Status 200, part of the text, and ``abort`` as the finish reason.

    Args:
        status_code: in the finish reason; None as after an abort by a client.
        message: in the finish reason.
        after: tokens before it.
    """

    status_code: int | None = None
    message: str = "Abort in waiting queue"
    after: int = 0


@dataclass(frozen=True, slots=True)
class StreamError:
    """An error as an event of a stream of status 200; to a plain request a status.

    Args:
        message: the server's words.
        code: the status that it stands for.
        after: events before it.
    """

    message: str
    code: int = 400
    after: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """The connection breaks after ``after`` events; before any byte where it is None."""

    after: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """The stream ends after ``after`` events as if all were well, without its end marker."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Hang:
    """Nothing more comes after ``after`` events; no byte at all where it is None."""

    after: int | None = None


@dataclass(frozen=True, slots=True)
class Say:
    """Status 200 and these bytes."""

    body: bytes


Fault = Refuse | Abort | StreamError | Drop | Cut | Hang | Say
