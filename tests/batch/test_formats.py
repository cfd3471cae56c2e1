"""Reading rows: shapes of bad lines, line numbers, pipes and memory."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsgl.batch.formats import MAX_LINE_BYTES, InputRow, RowFile, _Splitter, fingerprint
from asyncsgl.errors import BatchError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def rows_of(path: Path) -> list[InputRow]:
    with RowFile(path) as file:
        rows = [row async for row in file.rows()]
        assert await file.count() == len(rows)
    return rows


async def test_rows_have_an_index_and_a_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"a": 1}\n\n  \r\n{"a": "zwei é"}\r\n\n{"a": null}')
    assert await rows_of(path) == [
        InputRow(0, 1, {"a": 1}),
        InputRow(1, 4, {"a": "zwei é"}),
        InputRow(2, 6, {"a": None}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not JSON: .* at character 8"),
        (b"{'a': 1}", "not JSON: .* at character 2"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data at character 10"),
        (b"hello", "not JSON"),
        (b"[1, 2]", "not a JSON object but an array"),
        (b'"text"', "not a JSON object but a string"),
        (b"3", "not a JSON object but a number"),
        (b"true", "not a JSON object but true or false"),
        (b"null", "not a JSON object but null"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (
            b"{" + b"".join(b'"%d": 0, ' % n for n in range(300_000)) + b'"299999": 0}',
            "the key '299999' is there twice",
        ),
        (b'{"a": "\xff"}', "not UTF-8: byte 8"),
        (b'{"a": "\\ud800"}', "not Unicode"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not usable JSON"),
        (b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than 16 MiB"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
async def test_a_bad_line_is_one_bad_row(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    first, bad, last = await rows_of(path)
    assert (first, last) == (InputRow(0, 1, {"a": 1}), InputRow(2, 4, {"a": 2}))
    assert (bad.index, bad.line, bad.value) == (1, 3, None)
    with pytest.raises(BatchError, match=message):
        raise bad.error or AssertionError


async def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert [row.value for row in await rows_of(path)] == [{"a": 1}, {"a": 2}]


async def test_utf16_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes('{"a": 1}\n'.encode("utf-16"))
    with pytest.raises(BatchError, match="save it as UTF-8"):
        await rows_of(path)


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
async def test_nothing_to_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert await rows_of(path) == []


async def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with (
        pytest.raises(BatchError, match=r"missing\.jsonl: No such file"),
        RowFile(tmp_path / "missing.jsonl"),
    ):
        pass
    with pytest.raises(BatchError, match="is a folder"), RowFile(tmp_path):
        pass


async def test_a_pipe_gives_each_row_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    seen = threading.Event()

    def feed() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(b'{"a": 1}\n{"a"')
            assert seen.wait(10), "the first row did not come before the second was written"
            pipe.write(b": 2}")

    feeder = threading.Thread(target=feed)
    feeder.start()
    rows = []
    with RowFile(path) as file:
        assert await file.count() is None
        async for row in file.rows():
            rows.append(row)
            seen.set()
    feeder.join()
    assert rows == [InputRow(0, 1, {"a": 1}), InputRow(1, 2, {"a": 2})]


async def test_rows_are_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"a": i, "filler": "x" * 500}) + "\n")

    tracemalloc.start()
    try:
        with RowFile(path) as rows:
            assert await rows.count() == 20_000
            assert sum([1 async for _ in rows.rows()]) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 3_000_000  # the file has 10 MB
    finally:
        tracemalloc.stop()


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=8),
    cuts=st.lists(st.integers(0, 100), max_size=6),
)
def test_lines_do_not_depend_on_the_chunks(lines: list[bytes], cuts: list[int]) -> None:
    whole = b"\n".join(lines)
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    splitter = _Splitter(limit=8)
    found = [
        numbered for start, end in pairwise(edges) for numbered in splitter.feed(whole[start:end])
    ]
    found += splitter.flush()
    expected: list[tuple[int, bytes | None]] = []
    for number, raw in enumerate(lines, start=1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 and len(raw) <= 8 else raw
        if len(line) > 8:
            expected.append((number, None))
        elif line.strip():
            expected.append((number, line))
    assert found == expected


def test_a_fingerprint_is_of_the_value_not_of_its_spelling() -> None:
    assert fingerprint({"a": 1, "b": "é"}) == fingerprint({"b": "\u00e9", "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
