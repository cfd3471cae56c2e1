"""What is shown of a batch: a live bar on a terminal, plain lines elsewhere, the summary."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from asyncsgl.batch.progress import LiveDisplay, show
from asyncsgl.batch.summary import summarize
from asyncsgl.batch.tally import Tally
from asyncsgl.types import Usage

if TYPE_CHECKING:
    from asyncsgl.batch.progress import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def run_some(display: Display) -> None:
    display.stage("loading the model")
    display.stage("loading the model", 0.5)
    display.stage("warming up")
    display.tally.total = 5
    display.rows_begin()
    display.skip()
    display.row(Usage(10, 4, requests=1))
    display.row(Usage(10, 0, requests=1), "BackendError: no", 3)
    display.row(Usage(), "BackendError: no", 4)


def test_counts() -> None:
    with show(stream=io.StringIO()) as display:
        run_some(display)
    tally = display.tally
    assert (tally.skipped, tally.answered, tally.failed, tally.done) == (1, 1, 2, 4)
    assert tally.usage == Usage(20, 4, requests=2)
    assert tally.errors == {"BackendError: no": (2, 3)}
    assert tally.seconds_left == pytest.approx(tally.seconds / 3)
    assert tally.tokens_per_second == pytest.approx(4 / tally.seconds)


def test_a_pipe_gets_each_stage_once_and_no_control_characters() -> None:
    stream = io.StringIO()
    with show(stream=stream) as display:
        run_some(display)
    assert stream.getvalue() == "loading the model\nwarming up\n"


def test_a_terminal_gets_a_live_bar() -> None:
    stream = Terminal()
    with show(stream=stream) as display:
        assert isinstance(display, LiveDisplay)
        run_some(display)
    text = stream.getvalue()
    assert "warming up" in text
    assert "4/5" in text
    assert "2 failed" in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text.rpartition("4/5")[2]  # cursor is back


def test_a_dumb_terminal_is_as_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with show(stream=stream) as display:
        run_some(display)
    assert "\x1b" not in stream.getvalue()


def test_the_display_goes_away_also_after_an_error() -> None:
    stream = Terminal()

    def fail() -> None:
        with show(stream=stream) as display:
            display.stage("loading")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "\x1b[?25h" in stream.getvalue()


def test_the_summary_has_the_counts_and_the_first_errors() -> None:
    tally = Tally()
    tally.add(Usage(1000, 234))
    for i in range(10):
        for line in range(i + 1):
            tally.add(Usage(), f"BackendError: [b]number {i}", 10 * i + line)
    stream = io.StringIO()
    summarize(tally, stream=stream)
    lines = stream.getvalue().splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["rows", "answered", "1"],
        ["rows", "failed", "55"],
        ["rows", "answered", "before", "0"],
        ["prompt", "tokens", "1,000"],
        ["generated", "tokens", "234"],
    ]
    assert "  line 0: BackendError: [b]number 0" in lines
    assert "  line 20 and 2 more: BackendError: [b]number 2" in lines
    assert "number 5" not in stream.getvalue()
    assert lines[-1] == "  and 5 others; each row's own is in the output"


def test_a_long_error_is_cut_in_the_summary_and_distinct_ones_are_bounded() -> None:
    tally = Tally()
    for i in range(5000):
        tally.add(Usage(), f"{'x' * 400} {i}", i)
    assert tally.failed == 5000
    assert len(tally.errors) == 1000
    stream = io.StringIO()
    summarize(tally, stream=stream)
    assert "x" * 300 + "…" in stream.getvalue()
    assert "x" * 301 not in stream.getvalue()
