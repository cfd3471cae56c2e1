"""Events come out whole however the bytes are cut."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from asyncsgl.backends.sse import EventParser

TEXTS = st.lists(st.text(max_size=20), max_size=6)


def parsed(stream: bytes, cuts: list[int]) -> list[bytes]:
    parser = EventParser()
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [stream[a:b] for a, b in itertools.pairwise(places)]
    return [data for piece in pieces for data in parser.push(piece)]


@given(
    TEXTS, st.lists(st.integers(0, 10_000), max_size=30), st.booleans(), st.sampled_from("\n \r\n")
)
def test_any_cut_gives_the_same_events(
    texts: list[str], cuts: list[int], space: bool, end: str
) -> None:
    end = "\r\n" if end == "\r" else "\n"
    lead = "data: " if space else "data:"
    said = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    stream = "".join(f"{lead}{data}{end}{end}" for data in said).encode()
    assert parsed(stream, cuts) == [data.encode() for data in said]


def test_comments_and_other_fields_are_passed_over() -> None:
    stream = b": hello\nevent: message\nid: 7\nretry: 3\ndata: a\n\n: more\n\ndata: b\n\n"
    assert parsed(stream, [3, 20]) == [b"a", b"b"]


def test_several_data_lines_are_one_event() -> None:
    assert parsed(b"data: a\ndata:b\ndata\n\n", []) == [b"a\nb\n"]


def test_what_follows_the_last_empty_line_is_no_event() -> None:
    assert parsed(b"data: a\n\ndata: half", []) == [b"a"]
    assert parsed(b"data: a\n\ndata: half\n", []) == [b"a"]
