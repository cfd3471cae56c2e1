"""The documentation's table of what each backend can do is what the backends declare."""

from __future__ import annotations

from asyncsgl.backends.base import FEATURES
from tools.capability_table import BACKENDS, ELEMENTS, PAGE, column, current, written


def test_the_table_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert current(page) == page, "write it anew: python -m tools.capability_table"


def test_the_table_has_every_element_and_every_backend() -> None:
    page = PAGE.read_text(encoding="utf-8")
    columns = written(page)
    assert list(ELEMENTS) == list(FEATURES)
    assert list(columns) == list(BACKENDS)
    for cells in columns.values():
        assert list(cells) == list(FEATURES)
        assert set(cells.values()) <= {"native", "emulated", "refused"}


def test_a_change_of_a_backend_shows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    cell = column("Runtime", page)["ebnf"]
    assert cell == "native"
    old = page.replace(f"| `gen(ebnf=)` | {cell} |", "| `gen(ebnf=)` | refused |")
    assert old != page
    assert current(old) == page
