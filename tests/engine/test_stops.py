"""Stop strings and patterns in growing text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsgl_engine.errors import InvalidRequest
from asyncsgl_engine.stops import StopMatcher, compile_patterns

letters = st.text("ab\n", min_size=1, max_size=4)


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(letters, min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_text_ends_before_the_first_stop_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops, ())
    shown = "".join(matcher.push(piece) for piece in pieces(text, cuts)) + matcher.flush()
    complete = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not complete:
        assert (shown, matcher.matched) == (text, None)
        return
    assert matcher.matched in stops
    assert text.startswith(shown + matcher.matched)
    assert not any(stop in shown for stop in stops)


@given(text=st.text("ab1", max_size=20), stop=letters)
def test_what_is_held_back_is_only_the_start_of_a_stop(text: str, stop: str) -> None:
    matcher = StopMatcher([stop], ())
    shown, pushed = "", ""
    for letter in text:
        pushed += letter
        shown += matcher.push(letter)
        if matcher.matched is not None:
            assert pushed == shown + stop
            return
        assert pushed.startswith(shown)
        assert stop.startswith(pushed.removeprefix(shown))


def test_a_pattern_stops_where_its_first_match_begins() -> None:
    matcher = StopMatcher((), compile_patterns([r"\d+\."]))
    assert [matcher.push(piece) for piece in ("abc 1", "2", "x 3", "4", ". tail")] == [
        "abc ",
        "",
        "12x ",
        "",
        "",
    ]
    assert matcher.matched == r"\d+\."
    assert matcher.push("more") == ""


def test_a_pattern_sees_the_text_before() -> None:
    matcher = StopMatcher((), compile_patterns([r"(?<=ab)c"]))
    assert "".join(matcher.push(letter) for letter in "cabc") == "cab"


def test_nothing_stops_before_it_is_armed() -> None:
    matcher = StopMatcher(["x"], ())
    assert matcher.push("axb", armed=False) == "axb"
    assert matcher.push("cxd") == "c"


def test_a_bad_pattern_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidRequest, match=re.escape("'(' does not compile")):
        compile_patterns(["("])


@pytest.mark.parametrize(
    "source",
    [
        "(?:(?:a{99}){99}){99}",
        "(?:" * 60 + "a" + ")+" * 60,
        "(?x)(?:a {99} # {1}\n ){99}",
        "(?:a(?:b[)]{9}(?#{1})){99,}){,99}",
    ],
)
def test_a_pattern_that_takes_too_much_memory_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest, match="repeat less"):
        compile_patterns([source])


def test_common_patterns_are_cheap() -> None:
    sources = [r"\d{4}-\d{2}-\d{2}", r"(?:\w+\s?){1,100}[.!?]", r"(?i)end|\Z", "[^]]{3}x"]
    assert [pattern.pattern for pattern in compile_patterns(sources)] == sources


def test_a_pattern_that_takes_too_long_is_refused_and_harms_nobody() -> None:
    matcher = StopMatcher((), compile_patterns(["(?:a|aa)+$"]))
    with pytest.raises(InvalidRequest, match="takes too long"):
        matcher.push("a" * 60 + "b")
    assert matcher.flush() == "a" * 60 + "b"
