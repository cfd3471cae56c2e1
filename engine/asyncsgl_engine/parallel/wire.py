"""What rank 0 and the other ranks say to each other, over a pair of sockets each.

A frame is its kind and the length of what follows, both uint32 in little-endian order, then that
many bytes: JSON, or for a plan int32 numbers in the same order. Nothing of it is executable.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RankFailed
from ..plan import PageCopy, Plan, Row

__all__ = ["Kind", "PlanReader", "pack_plan", "receive", "send", "send_json"]

_HEAD = struct.Struct("<II")
_LONGEST = 1 << 28  # bytes; a plan has a few for each token and page of a step
_NUMBER = np.dtype("<i4")
_ROW, _COPY = 8, 3  # numbers

Numbers = npt.NDArray[np.int32]


class Kind(IntEnum):
    """What a frame is.

    HELLO, READY and FAILED come from the other ranks; SETUP, CONFIG and PLAN go to them.
    """

    HELLO = 1
    SETUP = 2
    READY = 3
    CONFIG = 4
    PLAN = 5
    FAILED = 6


def send(sock: socket.socket, kind: Kind, body: bytes = b"") -> None:
    """Send one frame.

    Raises:
        OSError: the other side is gone, or takes nothing for as long as the socket's timeout.
    """
    sock.sendall(_HEAD.pack(kind, len(body)))
    sock.sendall(body)


def send_json(sock: socket.socket, kind: Kind, body: Mapping[str, object]) -> None:
    """Send one frame of JSON."""
    send(sock, kind, json.dumps(body).encode())


def receive(sock: socket.socket) -> tuple[Kind, bytes] | None:
    """Wait for the next frame; None when the other side has closed.

    Raises:
        OSError: nothing came for as long as the socket's timeout.
        RankFailed: it is no frame.
    """
    head = _exactly(sock, _HEAD.size)
    if head is None:
        return None
    number, length = _HEAD.unpack(head)
    if length > _LONGEST or number not in set(Kind):
        raise RankFailed(f"a rank sent a frame of kind {number} and {length} bytes")
    body = _exactly(sock, length)
    return None if body is None else (Kind(number), body)


def _exactly(sock: socket.socket, length: int) -> bytes | None:
    parts = []
    while length:
        part = sock.recv(min(length, 1 << 20))
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def pack_plan(plan: Plan) -> bytes:
    """A plan as bytes: its rows and copies, then their tokens and new pages.

    Of the scored tokens only the number goes along: their logits are needed at rank 0 alone.
    """
    heads: list[int] = [len(plan.rows), len(plan.copies)]
    bodies: list[Sequence[int]] = []
    for slot, tokens, start, pages, fresh_from, score_from, targets, sample in plan.rows:
        fresh = pages[fresh_from:]
        heads += (slot, len(tokens), start, fresh_from, len(fresh))
        heads += (score_from, len(targets), sample)
        bodies += (tokens, fresh)
    for copy in plan.copies:
        heads += (copy.source, copy.target, copy.tokens)
    numbers = [np.array(heads, dtype=_NUMBER)]
    numbers += [np.array(body, dtype=_NUMBER) for body in bodies]
    return np.concatenate(numbers).tobytes()


class PlanReader:
    """Makes plans of bytes again; remembers each slot's pages, of which only new ones come."""

    def __init__(self) -> None:
        self._pages: dict[int, list[int]] = {}

    def read(self, body: bytes) -> Plan:
        """The plan that was packed, with as many targets, all of them 0."""
        numbers: Numbers = np.frombuffer(body, dtype=_NUMBER)
        count, copies = (int(number) for number in numbers[:2])
        middle = 2 + count * _ROW
        end = middle + copies * _COPY
        rows = self._rows(numbers[2:middle].reshape(-1, _ROW).tolist(), numbers[end:])
        done = numbers[middle:end].reshape(-1, _COPY).tolist()
        return Plan(tuple(rows), tuple(PageCopy(*copy) for copy in done))

    def _rows(self, heads: list[Any], rest: Numbers) -> Iterator[Row]:
        place = 0
        for slot, length, start, fresh_from, fresh, score_from, targets, sample in heads:
            tokens = rest[place : place + length].tolist()
            place += length
            pages = self._pages.setdefault(slot, [])
            del pages[fresh_from:]
            pages += rest[place : place + fresh].tolist()
            place += fresh
            yield Row(
                slot,
                tokens,
                start,
                pages,
                fresh_from,
                score_from,
                (0,) * targets,
                sample=bool(sample),
            )
