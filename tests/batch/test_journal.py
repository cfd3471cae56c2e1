"""The journal: durable lines, resuming, repair, refusals, order."""

# ruff: noqa: ASYNC240 - the tests look at small files while nothing else runs
from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from asyncsgl.batch.journal import Journal
from asyncsgl.batch.result import RowFailure, RowResult
from asyncsgl.errors import BatchError
from asyncsgl.types import Usage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from asyncsgl.batch.formats import JsonValue

pytestmark = pytest.mark.anyio

SETTINGS: Mapping[str, JsonValue] = {"model": "m", "temperature": 0.0}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def answer(index: int, text: str = "yes", question: str | None = None) -> RowResult:
    row = {"question": question or f"q{index}"}
    return RowResult(index, row, {"answer": text}, Usage(3, 2, 1, 0, 1))


def failure(index: int) -> RowResult:
    error = RowFailure("BackendError", "no", index + 1)
    return RowResult(index, {"question": f"q{index}"}, {}, Usage(), error)


def row_of(index: int) -> Mapping[str, JsonValue]:
    return {"question": f"q{index}"}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def write(path: Path, *results: RowResult, finish: int | None = None) -> int:
    dropped = 0
    async with Journal(path, SETTINGS) as journal:
        for result in results:
            await journal.append(result)
        if finish is not None:
            dropped = await journal.finish(finish)
    return dropped


async def answered(path: Path, rows: int = 10) -> list[int]:
    async with Journal(path, SETTINGS) as journal:
        return [i for i in range(rows) if journal.has_answer(i, row_of(i))]


async def test_a_line_is_there_as_soon_as_it_is_told(out: Path) -> None:
    async with Journal(out, SETTINGS) as journal:
        await journal.append(answer(0, "Zürich 東京"))
        assert lines(out) == [
            {
                "index": 0,
                "input": {"question": "q0"},
                "variables": {"answer": "Zürich 東京"},
                "usage": {
                    "prompt_tokens": 3,
                    "completion_tokens": 2,
                    "cached_tokens": 1,
                    "reasoning_tokens": 0,
                    "requests": 1,
                    "cache_write_tokens": 0,
                },
                "error": None,
                "settings": SETTINGS,
            }
        ]
        assert "東京" in out.read_text()


async def test_a_return_value_is_kept(out: Path) -> None:
    await write(out, RowResult(0, {}, {}, Usage(), return_value=[1, None]))
    assert lines(out)[0]["return_value"] == [1, None]


async def test_many_lines_at_once_are_all_written_in_order(out: Path) -> None:
    async with Journal(out, SETTINGS) as journal:
        await asyncio.gather(*(journal.append(answer(i)) for i in range(5000)))
    assert [line["index"] for line in lines(out)] == list(range(5000))


async def test_what_was_handed_over_is_written_even_if_nobody_waits(out: Path) -> None:
    async with Journal(out, SETTINGS) as journal:
        for i in range(100):
            journal.append(answer(i))
    assert len(lines(out)) == 100


async def test_cancelling_the_close_does_not_lose_lines(out: Path) -> None:
    begun = asyncio.Event()

    async def run() -> None:
        async with Journal(out, SETTINGS) as journal:
            for i in range(2000):
                journal.append(answer(i))
            begun.set()

    task = asyncio.create_task(run())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(lines(out)) == 2000


async def test_text_that_is_not_unicode_is_escaped(out: Path) -> None:
    await write(out, answer(0, "half \ud800"))
    assert lines(out)[0]["variables"] == {"answer": "half \ud800"}


@pytest.mark.parametrize("value", [float("nan"), object()])
async def test_what_is_not_json_is_refused_and_nothing_written(out: Path, value: object) -> None:
    async with Journal(out, SETTINGS) as journal:
        with pytest.raises((TypeError, ValueError)):
            journal.append(RowResult(0, {}, {"x": value}, Usage()))  # type: ignore[dict-item]
    assert out.read_bytes() == b""


async def test_resuming_knows_the_answered_rows(out: Path) -> None:
    await write(out, answer(2), failure(1), answer(0))
    async with Journal(out, SETTINGS) as journal:
        assert journal.answered == 2
        assert [journal.has_answer(i, row_of(i)) for i in range(4)] == [True, False, True, False]
        assert not journal.has_answer(0, {"question": "another"})


async def test_the_last_line_of_a_row_counts(out: Path) -> None:
    await write(out, failure(0), answer(0), answer(1), failure(1))
    assert await answered(out) == [0]


@pytest.mark.parametrize("keep", [1, 5, 9, 30, -1])
async def test_a_torn_last_line_is_cut_off(out: Path, keep: int) -> None:
    await write(out, answer(0), answer(1))
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    end = len(whole) - 2 if keep == -1 else first + keep
    out.write_bytes(whole[:end])
    assert await answered(out) == [0]
    assert out.read_bytes() == whole[:first]
    await write(out, answer(1))
    assert out.read_bytes() == whole


async def test_a_last_line_that_lacks_only_its_end_is_kept(out: Path) -> None:
    await write(out, answer(0), answer(1))
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    assert await answered(out) == [0, 1]
    assert out.read_bytes() == whole


async def test_zeros_after_a_power_cut_are_cut_off(out: Path) -> None:
    await write(out, answer(0))
    whole = out.read_bytes()
    out.write_bytes(whole + b"\0" * 100)
    assert await answered(out) == [0]
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"my precious notes\n",
        b"my precious notes",
        b'{"question": "q0"}\n',
        b'{"question": "q0"}',
        b'{"index": -1, "input": {}, "error": null}\n',
        b'{"index": "0", "input": {}, "error": null}\n',
        b"[]\n",
    ],
)
async def test_a_file_of_something_else_is_left_alone(out: Path, content: bytes) -> None:
    out.write_bytes(content)
    with pytest.raises(BatchError, match="choose another output file"):
        await answered(out)
    assert out.read_bytes() == content


async def test_answers_of_other_settings_are_refused(out: Path) -> None:
    await write(out, failure(0), answer(1))
    before = out.read_bytes()
    with pytest.raises(BatchError, match=r"line 2 of .*temperature was 0\.0 and is 0\.7"):
        await Journal(out, {"model": "m", "temperature": 0.7}).__aenter__()
    assert out.read_bytes() == before


async def test_failures_of_other_settings_are_retried(out: Path) -> None:
    await write(out, failure(0))
    async with Journal(out, {"model": "other"}) as journal:
        assert journal.answered == 0


async def test_overwriting_begins_anew(out: Path) -> None:
    await write(out, answer(0))
    async with Journal(out, {"model": "other"}, overwrite=True) as journal:
        assert journal.answered == 0
        await journal.append(answer(1))
    assert [line["index"] for line in lines(out)] == [1]


async def test_finishing_leaves_one_line_a_row_in_order(out: Path) -> None:
    out.touch(mode=0o640)
    out.chmod(0o640)
    results = [answer(3), failure(1), answer(0), answer(7), answer(1, "at last"), failure(2)]
    assert await write(out, *results, finish=4) == 1
    assert [(line["index"], line["error"] is None) for line in lines(out)] == [
        (0, True),
        (1, True),
        (2, False),
        (3, True),
    ]
    assert lines(out)[1]["variables"] == {"answer": "at last"}
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    assert await answered(out) == [0, 1, 3]


async def test_finishing_what_is_in_order_leaves_the_file_itself(out: Path) -> None:
    out.touch()
    before = out.stat().st_ino
    await write(out, answer(0), answer(1), finish=2)
    assert out.stat().st_ino == before


async def test_a_link_stays_a_link(tmp_path: Path, out: Path) -> None:
    target = tmp_path / "target.jsonl"
    target.touch()
    out.symlink_to(target)
    await write(out, answer(1), answer(0), finish=2)
    assert out.is_symlink()
    assert [line["index"] for line in lines(target)] == [0, 1]


async def test_two_at_once_are_refused(out: Path) -> None:
    async with Journal(out, SETTINGS) as journal:
        with pytest.raises(BatchError, match="written by another process"):
            await Journal(out, SETTINGS).__aenter__()
        await journal.append(answer(1))
        await journal.append(answer(0))
        await journal.finish(2)
    assert await answered(out) == [0, 1]


async def test_a_run_that_fails_before_its_first_result_leaves_no_file(out: Path) -> None:
    async def fail() -> None:
        async with Journal(out, SETTINGS):
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert not out.exists()
    out.touch()
    with pytest.raises(KeyError):
        await fail()
    assert out.exists()


async def test_no_plain_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BatchError, match="no plain file"):
        await answered(pipe)
    with pytest.raises(BatchError, match="Is a directory"):
        await answered(tmp_path)
    with pytest.raises(BatchError, match="No such file"):
        await answered(tmp_path / "nowhere" / "out.jsonl")


async def test_a_full_disk_is_an_error_and_what_was_written_stays(out: Path) -> None:
    script = """
import asyncio, resource, sys
from pathlib import Path
from asyncsgl.batch.journal import Journal
from asyncsgl.batch.result import RowResult
from asyncsgl.errors import BatchError
from asyncsgl.types import Usage

async def refused(work):
    try:
        await work
    except BatchError as error:
        return str(error)
    return None

async def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    journal = await Journal(Path(sys.argv[1]), {}).__aenter__()
    told = 0
    def answer():
        return journal.append(RowResult(told, {"question": "q"}, {}, Usage()))
    while (first := await refused(answer())) is None:
        told += 1
    print(told, first, await refused(answer()), await refused(journal.__aexit__(None)), sep="|")

asyncio.run(main())
"""
    command = [sys.executable, "-c", script, str(out)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    told, first, *later = done.stdout.strip().split("|")
    assert first == f"cannot write {out}: File too large", done.stderr
    assert all(refusal.startswith("cannot write") for refusal in later)
    whole = out.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["index"] for line in whole] == list(range(int(told)))


async def test_a_killed_process_has_written_what_it_was_told(out: Path) -> None:
    script = """
import asyncio, os, signal, sys
from pathlib import Path
from asyncsgl.batch.journal import Journal
from asyncsgl.batch.result import RowResult
from asyncsgl.types import Usage

async def main():
    async with Journal(Path(sys.argv[1]), {}) as journal:
        for i in range(1000):
            await journal.append(RowResult(i, {"question": f"q{i}"}, {}, Usage()))
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, str(out)])
    assert done.returncode == -9
    assert [line["index"] for line in lines(out)] == list(range(1000))


async def test_a_system_without_such_locks_is_refused_by_name(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with pytest.raises(BatchError, match=r"Windows does not do: run it in WSL"):
        await write(out, answer(0))
