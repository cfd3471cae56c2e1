"""Reads the rows of a JSONL file, lazily and by line number, and never trips over a bad one."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NoReturn, Self, TypeAlias

import anyio
from anyio import to_thread

from ..errors import BatchError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator
    from pathlib import Path

__all__ = ["InputRow", "JsonValue", "RowError", "RowFile", "fingerprint"]

JsonValue: TypeAlias = (
    "str | int | float | bool | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)

MAX_LINE_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_STDIN = 0


class RowError(BatchError):
    """One row of the input cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of the input.

    Args:
        index: its position among the lines that are not empty, from 0.
        line: its line in the file, from 1.
        value: the JSON object; ``None`` if the line is not one.
        error: why the line is not a JSON object; ``None`` if it is.
    """

    index: int
    line: int
    value: Mapping[str, JsonValue] | None
    error: RowError | None = None


def fingerprint(value: object) -> int:
    """A 64-bit hash of a JSON value; the order of an object's keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


class RowFile:
    """A JSONL file that is open for reading, or the standard input.

    Used as ``with``. Reading happens in threads, or waits for a pipe on the event loop, so
    neither a slow disk nor a slow writer at the other end blocks it.

    Args:
        path: the file; ``None`` is the standard input.

    Raises:
        BatchError: the file cannot be read; raised on entering and on reading.
    """

    def __init__(self, path: Path | None) -> None:
        self.name = "the standard input" if path is None else str(path)
        self._path = path
        self._fd = -1
        self._regular = False

    def __enter__(self) -> Self:
        try:
            self._fd = _STDIN if self._path is None else os.open(self._path, os.O_RDONLY)
            mode = os.fstat(self._fd).st_mode
        except OSError as error:
            self._refuse(error)
        self._regular = stat.S_ISREG(mode)
        if stat.S_ISDIR(mode):
            self.__exit__()
            raise BatchError(f"{self.name} is a folder, not a JSONL file")
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            os.close(self._fd)
        self._fd = -1

    async def count(self) -> int | None:
        """How many rows there are; ``None`` where they can be read only once."""
        if not self._regular:
            return None
        return await to_thread.run_sync(self._count)

    def _count(self) -> int:
        splitter, offset, rows = _Splitter(MAX_LINE_BYTES), 0, 0
        while chunk := self._pread(offset):
            offset += len(chunk)
            rows += sum(1 for _ in splitter.feed(chunk))
        return rows + sum(1 for _ in splitter.flush())

    async def rows(self) -> AsyncGenerator[InputRow, None]:
        """The rows in order. Empty lines are none; a line that is no JSON object is a bad row."""
        splitter, offset, index = _Splitter(MAX_LINE_BYTES), 0, 0
        while chunk := await self._read(offset):
            offset += len(chunk)
            for line, raw in splitter.feed(chunk):
                yield self._parsed(index, line, raw)
                index += 1
        for line, raw in splitter.flush():
            yield self._parsed(index, line, raw)
            index += 1

    async def _read(self, offset: int) -> bytes:
        if self._regular:
            return await to_thread.run_sync(self._pread, offset)
        with suppress(PermissionError):  # a device that cannot be waited for never blocks
            await anyio.wait_readable(self._fd)
        try:
            return await to_thread.run_sync(os.read, self._fd, _CHUNK_BYTES)
        except OSError as error:
            self._refuse(error)

    def _pread(self, offset: int) -> bytes:
        try:
            return os.pread(self._fd, _CHUNK_BYTES, offset)
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> NoReturn:
        raise BatchError(f"cannot read {self.name}: {error.strerror}") from error

    def _parsed(self, index: int, line: int, raw: bytes | None) -> InputRow:
        if line == 1 and raw is not None and raw.startswith(_UTF16_BOMS):
            raise BatchError(f"{self.name} is UTF-16; save it as UTF-8")
        try:
            return InputRow(index, line, _object_of(raw))
        except RowError as error:
            return InputRow(index, line, None, error)


class _Splitter:
    """Cuts chunks of bytes into numbered lines and leaves out the empty ones.

    A line longer than ``limit`` bytes is given as ``None`` and never held in memory.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._line = 1
        self._begun: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        """The lines that ``chunk`` completes; consume them before feeding again."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._add(chunk[start:end])
            yield from self.flush()
            start = end + 1
        self._add(chunk[start:])

    def flush(self) -> Iterator[tuple[int, bytes | None]]:
        """The line that has no end yet, if it is not empty."""
        line = b"".join(self._begun)
        if self._line == 1:
            line = line.removeprefix(_BOM)
        number, too_long = self._line, self._size > self._limit
        self._begun, self._size = [], 0
        self._line += 1
        if too_long or line.strip():
            yield number, None if too_long else line

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._limit:
            self._begun.append(piece)
        else:
            self._begun.clear()


def _object_of(raw: bytes | None) -> Mapping[str, JsonValue]:
    if raw is None:
        raise RowError(f"the line is longer than {MAX_LINE_BYTES // 1024**2} MiB")
    try:
        value = _DECODER.decode(raw.decode())
        if b"\\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("not Unicode: half of a surrogate pair stands alone") from error
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte {error.start + 1} of the line is wrong") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.colno}") from error
    except RecursionError as error:
        raise RowError("not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise RowError(f"not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise RowError(f"not a JSON object but {_KINDS[type(value)]}: write one object a line")
    return value


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RowError(f"the key {_first_repeated(key for key, _ in pairs)!r} is there twice")
    return found


def _first_repeated(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key is repeated")


def _no_constant(name: str) -> NoReturn:
    raise RowError(f"not JSON: {name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RowError(f"the number {digits} is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
)
_KINDS = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "an array",
    type(None): "null",
}
