"""The output file of a batch, which is at once the journal that a later run resumes from."""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, Self

import anyio
from anyio import to_thread

from ..errors import BatchError
from .formats import fingerprint
from .locking import lock
from .ordering import put_in_order
from .result import RowResult, StoredResult
from .writer import LineWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from .formats import JsonValue

__all__ = ["Journal"]

_TORN = b'{"index":'


class Journal:
    """Appends one line for each finished row, and knows the rows that are answered.

    The file is plain JSONL at any time. Opening it cuts off a last line that a crash left
    torn and reads which rows are answered: those whose last line has no error and the same
    input. :meth:`finish` puts the lines in the order of the input, one for each row.

    A line is handed to the operating system as soon as its row is done, so a killed process
    loses nothing that was written. It is forced to the disk once a second and on closing: a
    power cut costs the rows of the last second, and the next run answers them again. Forcing
    it for every row would slow fast models down to the speed of the disk.

    Used as ``async with``. The file is locked meanwhile.

    Args:
        path: the file; made if it is not there.
        settings: what the answers depend on beside the row. It is written on every line, and a
            file with answers of other settings is refused.
        overwrite: empty the file first.

    Raises:
        BatchError: on entering: the file cannot be written, is in use by another process, was
            not written by a journal, or has answers of other settings.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, JsonValue], *, overwrite: bool = False
    ) -> None:
        self._path = path
        self._settings = dict(settings)
        self._overwrite = overwrite
        self._made = False
        self._answered: dict[int, int] = {}
        self._file: BinaryIO | None = None
        self._writer: LineWriter | None = None

    @property
    def answered(self) -> int:
        """How many rows were answered when the file was opened."""
        return len(self._answered)

    def has_answer(self, index: int, row: Mapping[str, JsonValue]) -> bool:
        """Whether this very row was answered when the file was opened."""
        known = self._answered.get(index)
        return known is not None and known == fingerprint(row)

    def append(self, result: RowResult) -> asyncio.Future[None]:
        """Hand over the line of a row; never waits.

        Returns:
            A future that is done when the operating system has the line. It raises BatchError
            if it could not be written, and so does every one after it.

        Raises:
            TypeError, ValueError: the result is not JSON; nothing was written.
        """
        assert self._writer is not None, "the journal is not open"
        return self._writer.write(result.to_line(self._settings))

    async def finish(self, rows: int) -> int:
        """End the writing and leave one line for each row, in the order of the input.

        The ordered file is written beside the old one and takes its place at once.

        Args:
            rows: how many rows the input has.

        Returns:
            How many rows were dropped because the input has them no more.

        Raises:
            BatchError: it could not be written; the unordered file is untouched.
        """
        assert self._file is not None, "the journal is not open"
        await self._drain()
        try:
            return await to_thread.run_sync(put_in_order, self._file, self._path, rows)
        except OSError as error:
            raise BatchError(
                f"all results are in {self._path}, but not in order, because the ordered file "
                f"could not be written: {error.strerror}"
            ) from error

    async def __aenter__(self) -> Self:
        self._file = await to_thread.run_sync(self._open)
        self._writer = LineWriter(self._file.fileno(), str(self._path))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None, "the journal is not open"
        try:
            await self._drain()
        finally:
            try:
                if kind is not None and self._made:
                    with anyio.CancelScope(shield=True):
                        await to_thread.run_sync(_remove_if_empty, self._file, self._path)
            finally:
                self._file.close()

    async def _drain(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            await writer.close()

    def _open(self) -> BinaryIO:
        self._path = self._path.resolve()  # a link stays one when the file is replaced
        self._made = not self._path.exists()
        file = _open_locked(self._path)
        try:
            if self._overwrite:
                file.truncate(0)
            for number, line in enumerate(_whole_lines(file, self._path), start=1):
                self._note(number, line)
        except OSError as error:
            file.close()
            raise BatchError(f"cannot resume from {self._path}: {error.strerror}") from error
        except BaseException:
            file.close()
            raise
        return file

    def _note(self, number: int, raw: bytes) -> None:
        if not raw.strip():
            return
        line = StoredResult.from_line(raw)
        if line is None:
            raise _foreign(self._path, f"line {number}")
        self._answered.pop(line.index, None)
        if line.failed:
            return
        if line.settings is not None and line.settings != self._settings:
            raise BatchError(
                f"line {number} of {self._path} was answered with other settings: "
                f"{_difference(line.settings, self._settings)}. Choose another output file, or "
                f"have this one overwritten"
            )
        self._answered[line.index] = fingerprint(line.input)


def _remove_if_empty(file: BinaryIO, path: Path) -> None:
    """Leave no trace of a run that came to nothing; who opens it meanwhile sees that it is gone."""
    if os.fstat(file.fileno()).st_size == 0:
        path.unlink()


def _foreign(path: Path, what: str) -> BatchError:
    return BatchError(
        f"{what} of {path} is no result of a batch, so nothing was written there; choose "
        f"another output file"
    )


def _difference(then: Mapping[str, JsonValue], now: Mapping[str, JsonValue]) -> str:
    return ", ".join(
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    )


def _open_locked(path: Path) -> BinaryIO:
    try:
        while True:
            file = _open_plain(path)
            try:
                lock(file)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        return file
            except BaseException:
                file.close()
                raise
            file.close()  # it was replaced between the opening and the lock
    except BlockingIOError as error:
        raise BatchError(
            f"{path} is being written by another process; wait for its end, or choose another "
            f"output file"
        ) from error
    except OSError as error:
        raise BatchError(f"cannot write {path}: {error.strerror}") from error


def _open_plain(path: Path) -> BinaryIO:
    """Open for reading and appending, made if need be; never waits for a pipe's other end."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BatchError(f"{path} is no plain file, and results need one to resume from")
    return os.fdopen(fd, "r+b")


def _whole_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines; in the end a torn last one is cut off, and a whole one without end gets it."""
    end, tail = 0, b""
    file.seek(0)
    for line in file:
        if line.endswith(b"\n"):
            end += len(line)
            yield line
        else:
            tail = line
    if not tail:
        return
    if StoredResult.from_line(tail) is not None:
        yield tail
        os.write(file.fileno(), b"\n")
    elif tail.startswith(_TORN) or _TORN.startswith(tail) or not tail.strip(b"\0"):
        file.truncate(end)
    else:
        raise _foreign(path, "the last line")
