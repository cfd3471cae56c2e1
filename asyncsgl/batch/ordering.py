"""Rewrites an output file so that it has one line for each row, in the order of the input."""

from __future__ import annotations

import os
import re
import shutil
from array import array
from typing import TYPE_CHECKING, BinaryIO

from .locking import lock
from .result import StoredResult

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["put_in_order"]

_INDEX = re.compile(rb'\{"index": ?(\d{1,18}),')


def put_in_order(file: BinaryIO, path: Path, rows: int) -> int:
    """Keep the last line of each row below ``rows``, in order; atomic.

    Args:
        file: the results, open for reading and locked.
        path: where they are, and the ordered ones shall be.
        rows: how many rows there are.

    Returns:
        How many rows were dropped because their index is not below ``rows``.

    Raises:
        OSError: the ordered file could not be written; the other is untouched.
    """
    places, dropped, ordered = _places(file, rows)
    if ordered:
        return 0
    beside = path.with_name(f".{path.name}.ordered")
    try:
        with beside.open("wb") as out:
            # Locked until it has taken its place, so that nobody begins to resume from it.
            lock(out, wait=True)
            shutil.copymode(path, beside)
            for place in places:
                if place >= 0:
                    file.seek(place)
                    out.write(file.readline())
            out.flush()
            os.fsync(out.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return dropped


def _places(file: BinaryIO, rows: int) -> tuple[array[int], int, bool]:
    """Where each row's last line begins (-1: nowhere), rows too many, whether all is in order."""
    places = array("q", [-1]) * rows
    too_many: set[int] = set()
    ordered, last, place = True, -1, 0
    file.seek(0)
    for line in file:
        index = _index_of(line)
        ordered = ordered and last < index < rows
        if 0 <= index < rows:
            places[index] = place
            last = index
        elif index >= rows:
            too_many.add(index)
        place += len(line)
    return places, len(too_many), ordered


def _index_of(line: bytes) -> int:
    if found := _INDEX.match(line):
        return int(found[1])
    stored = StoredResult.from_line(line)
    return -1 if stored is None else stored.index
