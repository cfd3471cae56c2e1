"""``asyncsgl batch`` as a user runs it: results, bad rows, statuses, resuming, signals."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Command

pytestmark = pytest.mark.timeout(120)  # each test starts processes

ASYNCSGL = (sys.executable, "-m", "asyncsgl")
QUESTIONS = [{"question": f"What is {i}?"} for i in range(40)]


def test_every_row_gets_its_line(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS)
    done = command.batch("in.jsonl")
    assert done.status == 0, done.err
    assert done.out == ""
    results = command.results()
    assert [result["index"] for result in results] == list(range(40))
    assert [result["input"] for result in results] == QUESTIONS
    assert all(result["variables"] == {"answer": "Paris."} for result in results)
    assert all(result["error"] is None for result in results)
    assert results[0]["usage"]["completion_tokens"] == 1
    assert re.search(r"rows answered +40\n", done.err)
    assert "Results: in.out.jsonl" in done.err


def test_the_three_shapes(command: Command) -> None:
    rows = [
        {"question": "Where?"},
        {"prompt": "Once upon"},
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
            ]
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    ]
    command.write("in.jsonl", *rows)
    done = command.batch("in.jsonl")
    assert done.status == 0, done.err
    assert [result["input"] for result in command.results()] == rows


BAD_ROWS: tuple[tuple[object, str], ...] = (
    ('{"question": "x"', "not JSON"),
    ("[]", "not a JSON object but an array"),
    ("{}", "this one has nothing"),
    ({"country": "Peru"}, "this one has 'country'"),
    ({"question": "x", "prompt": "y"}, "this one has prompt and question"),
    ({"question": "x", "color": "red"}, "unknown: color"),
    ({"question": 5}, "'question' must be a text, got 5"),
    ({"messages": []}, "at least one message"),
    ({"messages": "hi"}, "at least one message"),
    ({"messages": [{"role": "user"}]}, "message 1 must be"),
    ({"messages": [{"role": "king", "content": "x"}]}, "message 1: the role must be one of"),
    ({"messages": [{"role": "user", "content": 5}]}, "message 1: the content must be"),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "message 1: the content must be",
    ),
)


def test_bad_rows_fail_alone_and_name_their_lines(command: Command) -> None:
    good = {"question": "a"}
    command.write("in.jsonl", good, "", *(row for row, _ in BAD_ROWS), good)
    done = command.batch("in.jsonl")
    assert done.status == 1
    first, *bad, last = command.results()
    assert first["error"] is None
    assert last["error"] is None
    assert len(bad) == len(BAD_ROWS)
    for index, (result, (_, message)) in enumerate(zip(bad, BAD_ROWS, strict=True), start=1):
        assert (result["index"], result["error"]["line"]) == (index, index + 2)
        assert result["variables"] == {}
        assert message in result["error"]["message"]
    error = bad[0]["error"]
    assert f"line 3: {error['type']}: {error['message']}" in done.err


PROGRAM = """
import asyncsgl as sgl

@sgl.function
async def capital(s, country, temperature=1.0):
    if country == "Atlantis":
        raise KeyError("sunk")
    s += sgl.user(f"What is the capital of {country}?")
    s += sgl.assistant(sgl.gen("capital"))
    s.set("doubled", [temperature * 2])
    await s["capital"]
    if country == "Utopia":
        raise ValueError("nowhere")
    return {"country": country} if country == "Peru" else None

other = 5
"""


def test_a_program_and_its_arguments(command: Command) -> None:
    command.write("programs.py", PROGRAM)
    command.write(
        "in.jsonl",
        {"country": "Peru", "temperature": 3},
        {"country": "Chile"},
        {"land": "Chile"},
        {},
        {"country": "Atlantis"},
        {"country": "Utopia"},
    )
    done = command.batch("in.jsonl", "--program", "programs.py:capital", "-o", "answers.jsonl")
    assert done.status == 1, done.err
    peru, chile, unknown, missing, failing, late = command.results("answers.jsonl")
    assert peru["variables"] == {"capital": "Paris.", "doubled": [6]}
    assert peru["return_value"] == {"country": "Peru"}
    assert "return_value" not in chile
    assert unknown["error"]["type"] == "InvalidArgument"
    assert "land" in unknown["error"]["message"]
    assert "missing" in missing["error"]["message"]
    assert failing["error"] == {"type": "KeyError", "message": "'sunk'", "line": 5}
    assert late["error"]["message"] == "nowhere"
    assert late["variables"]["capital"] == "Paris."
    assert late["usage"]["requests"] == 1


def test_the_program_may_be_in_a_module(command: Command) -> None:
    command.write("programs.py", PROGRAM)
    command.write("in.jsonl", {"country": "Chile"})
    assert command.batch("in.jsonl", "--program", "programs:capital").status == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.py:capital", "there is no file missing.py"),
        ("missing:capital", "there is no module 'missing'"),
        ("programs.py:capitol", "has no program 'capitol'; did you mean capital?"),
        ("programs.py:other", "other in programs.py is no program: decorate"),
        ("broken.py:x", "cannot import broken.py: line 2: "),
        ("failing.py:x", "cannot import failing.py: line 3: RuntimeError: oh no"),
        ("failing:x", "cannot import failing: line 3: RuntimeError: oh no"),
        ("leaving.py:x", "cannot import leaving.py: line 1: SystemExit"),
        ("backend.py", "backend.py has no Program: name one"),
    ],
)
def test_a_program_that_cannot_be_had(command: Command, spec: str, message: str) -> None:
    command.write("programs.py", PROGRAM)
    command.write("broken.py", "x = 1", "def (:")
    command.write("failing.py", "def fail():", "    pass", "raise RuntimeError('oh no')")
    command.write("leaving.py", "raise SystemExit(0)")
    command.write("in.jsonl", {"country": "Chile"})
    done = command.batch("in.jsonl", "--program", spec)
    assert done.status == 2
    assert done.err.startswith("asyncsgl: error: ")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (command.folder / "in.out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jsonl",), "cannot read missing.jsonl: No such file or directory"),
        (("-",), "reading the standard input needs -o"),
        (("in.jsonl", "-o", "in.jsonl"), "in.jsonl is the input"),
        (("in.jsonl", "-o", "nowhere/out.jsonl"), "nowhere/out.jsonl: No such file"),
        (("in.jsonl", "-o", "notes.txt"), "line 1 of"),
        (("in.jsonl", "--concurrency", "0"), "'auto' or a whole number above 0"),
        (("in.jsonl", "--concurrency", "many"), "'auto' or a whole number above 0"),
        (("in.jsonl", "--max-tokens", "0"), "max-tokens"),
        (("in.jsonl", "--temperature", "-1"), "temperature"),
        (("in.jsonl", "--colour"), "No such option"),
        ((), "Missing argument"),
    ],
)
def test_wrong_usage(command: Command, arguments: tuple[str, ...], message: str) -> None:
    command.write("in.jsonl", {"question": "a"})
    command.write("notes.txt", "my notes")
    done = command.batch(*arguments)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert (command.folder / "in.jsonl").read_text() == '{"question": "a"}\n'
    assert (command.folder / "notes.txt").read_text() == "my notes\n"


def test_a_model_that_cannot_start(command: Command) -> None:
    command.write(
        "dead.py",
        "from asyncsgl.testing import ScriptedBackend",
        "from asyncsgl import BackendError",
        "class Dead(ScriptedBackend):",
        "    async def __aenter__(self):",
        "        raise BackendError('no weights there', backend='dead')",
        "backend = Dead()",
    )
    command.write("in.jsonl", {"question": "a"})
    done = command("batch", "in.jsonl", "--model", "dead.py:backend")
    assert done.status == 2
    assert "asyncsgl: error: no weights there (dead)\n" in done.err
    assert not (command.folder / "in.out.jsonl").exists()
    assert "Traceback" not in done.err
    debugged = command("batch", "in.jsonl", "--model", "dead.py:backend", "--debug")
    assert debugged.status == 2
    assert "Traceback" in debugged.err


def test_an_error_that_meets_every_row_ends_the_batch(command: Command) -> None:
    command.write(
        "locked.py",
        "from asyncsgl.testing import ScriptedBackend",
        "from asyncsgl import AuthenticationError",
        "backend = ScriptedBackend(lambda request: AuthenticationError('wrong key'))",
    )
    command.write("in.jsonl", *QUESTIONS)
    done = command("batch", "in.jsonl", "--model", "locked.py:backend")
    assert done.status == 2
    assert "asyncsgl: error: wrong key\n" in done.err


def test_a_missing_package_names_its_extra(command: Command) -> None:
    command.write("in.jsonl", {"question": "a"})
    command.write(
        "without.py",
        "import sys",
        "sys.modules['torch'] = None",
        "sys.argv = ['asyncsgl', 'batch', 'in.jsonl']",
        "from asyncsgl.cli import main",
        "main()",
    )
    done = subprocess.run(
        [sys.executable, "without.py"], cwd=command.folder, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"'torch' is needed here: pip install 'asyncsgl[engine]'" in done.stderr
    assert b"Traceback" not in done.stderr


def test_rows_may_come_from_the_standard_input(command: Command) -> None:
    rows = '{"question": "a"}\n{"question": "b"}\n'
    assert command.batch("-", "-o", "out.jsonl", stdin=rows).status == 0
    assert len(command.results("out.jsonl")) == 2
    again = command.batch("-", "-o", "out.jsonl", stdin=rows)
    assert re.search(r"rows answered before +2\n", again.err)


def test_an_empty_input_gives_an_empty_output(command: Command) -> None:
    command.write("in.jsonl")
    assert command.batch("in.jsonl").status == 0
    assert command.results() == []


def test_running_again_skips_what_is_answered_and_retries_what_failed(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS[:3], "{bad", *QUESTIONS[3:6])
    assert command.batch("in.jsonl").status == 1
    before = command.results()
    command.write(
        "in.jsonl", *QUESTIONS[:3], {"question": "good"}, *QUESTIONS[3:5], {"question": "new"}
    )
    done = command.batch("in.jsonl")
    assert done.status == 0
    assert re.search(r"rows answered +2\n", done.err)
    assert re.search(r"rows answered before +5\n", done.err)
    after = command.results()
    assert [result["index"] for result in after] == list(range(7))
    assert after[:3] + after[4:6] == before[:3] + before[4:6]
    assert after[3]["input"] == {"question": "good"}
    assert after[6]["input"] == {"question": "new"}


def test_a_finished_batch_does_not_start_the_model(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS[:3], "{bad")
    assert command.batch("in.jsonl").status == 1
    backend = command.folder / "backend.py"
    backend.write_text(
        backend.read_text() + "async def refuse(self): raise RuntimeError('started')\n"
        "ScriptedBackend.__aenter__ = refuse\n"
    )
    done = command.batch("in.jsonl")
    assert (done.status, re.search(r"before +3\n", done.err) is not None) == (1, True), done.err


def test_other_settings_are_refused_unless_overwritten(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS[:3])
    assert command.batch("in.jsonl").status == 0
    refused = command.batch("in.jsonl", "--temperature", "0.5")
    assert refused.status == 2
    assert "temperature was 0.0 and is 0.5" in refused.err
    assert command.batch("in.jsonl", "--temperature", "0.5", "--overwrite").status == 0
    assert {result["settings"]["temperature"] for result in command.results()} == {0.5}


def test_rows_that_are_gone_from_the_input_are_dropped_and_counted(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS[:5])
    assert command.batch("in.jsonl").status == 0
    command.write("in.jsonl", *QUESTIONS[:3])
    done = command.batch("in.jsonl")
    assert done.status == 0
    assert len(command.results()) == 3
    assert "2 results" in done.err


def test_two_processes_do_not_write_one_file(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS[:2])
    read, write = os.pipe()
    first = subprocess.Popen(
        [*ASYNCSGL, "batch", "-", "-o", "in.out.jsonl", "--model", "backend.py:backend"],
        cwd=command.folder,
        stdin=read,
        stderr=subprocess.PIPE,
    )
    os.close(read)
    try:
        assert first.stderr is not None
        while b"looking" not in first.stderr.readline():
            pass
        os.write(write, b'{"question": "a"}\n')
        while b"starting" not in first.stderr.readline():
            pass
        second = command.batch("in.jsonl")
        assert second.status == 2
        assert "is being written by another process" in second.err
    finally:
        os.close(write)
        first.communicate(timeout=15)
    assert first.returncode == 0


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_cleanly_and_the_next_run_goes_on(
    command: Command, name: str, status: int
) -> None:
    command.write("in.jsonl", *QUESTIONS)
    stopping = {"TEST_SIGNAL": name, "TEST_SIGNAL_AT": "25"}
    stopped = command.batch("in.jsonl", "--concurrency", "4", env=stopping)
    assert stopped.status == status, stopped.err
    assert "the same command again goes on" in stopped.err
    assert "Traceback" not in stopped.err
    kept = command.results()
    assert 21 <= len(kept) < 40
    again = command.batch("in.jsonl", "--concurrency", "4")
    assert again.status == 0
    assert re.search(rf"rows answered before +{len(kept)}\n", again.err)
    assert [result["input"] for result in command.results()] == QUESTIONS


STUBBORN = """
import asyncio, os, signal
from asyncsgl.testing import ScriptedBackend

def stop():
    os.kill(os.getpid(), signal.Signals[os.environ["TEST_SIGNAL"]])

async def answer(request):
    stop()
    try:
        await asyncio.sleep(3600)
    finally:
        stop()
        await asyncio.sleep(3600)

backend = ScriptedBackend(answer)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_kills(command: Command, name: str) -> None:
    command.write("stubborn.py", STUBBORN)
    command.write("in.jsonl", *QUESTIONS[:1])
    model = ("--model", "stubborn.py:backend")
    done = command("batch", "in.jsonl", *model, env={"TEST_SIGNAL": name})
    assert done.status == -signal.Signals[name], done.err


def test_a_killed_batch_goes_on_where_it_was(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS)
    seen = 0
    for at in (7, 12, 9):
        killing = {"TEST_SIGNAL": "SIGKILL", "TEST_SIGNAL_AT": str(at)}
        killed = command.batch("in.jsonl", "--concurrency", "3", env=killing)
        assert killed.status == -signal.SIGKILL
        whole = (command.folder / "in.out.jsonl").read_bytes().rpartition(b"\n")[0]
        assert whole.count(b"\n") + 1 > seen
        seen = whole.count(b"\n") + 1
        # As if the machine had stopped within a write.
        with (command.folder / "in.out.jsonl").open("ab") as out:
            out.write(b'{"index": 39, "input": {"quest')
    done = command.batch("in.jsonl", "--concurrency", "3")
    assert done.status == 0
    assert re.search(rf"rows answered before +{seen}\n", done.err)
    assert [result["index"] for result in command.results()] == list(range(40))
    assert [result["input"] for result in command.results()] == QUESTIONS


def test_a_terminal_sees_a_bar_that_goes_away(command: Command) -> None:
    command.write("in.jsonl", *QUESTIONS)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*ASYNCSGL, "batch", "in.jsonl", "--model", "backend.py:backend"],
        cwd=command.folder,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    assert process.wait(timeout=15) == 0
    text = shown.decode()
    assert "40/40" in text
    assert "rows answered" in text.rpartition("40/40")[2]


def test_help_and_version(command: Command) -> None:
    assert re.fullmatch(r"asyncsgl \d+\.\d+\.\d+\S*\n", command("--version").out)
    assert "batch" in command("--help").out
    shown = command("batch", "--help")
    assert shown.status == 0
    assert "asyncsgl batch questions.jsonl" in shown.out
    assert "Exit status" in shown.out
    nothing = command()
    assert nothing.status == 2
    assert "Usage" in nothing.out + nothing.err
