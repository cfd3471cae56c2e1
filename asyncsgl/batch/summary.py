"""The table that closes a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from .progress import console_for

if TYPE_CHECKING:
    from rich.table import Table

    from .tally import Tally

__all__ = ["summarize"]

_SHOWN_ERRORS = 5
_SHOWN_ERROR_LENGTH = 300


def summarize(tally: Tally, *, stream: TextIO | None = None) -> None:
    """Write the table that closes a batch, and its first distinct errors."""
    console = console_for(stream)
    console.print(_table(tally))
    if not tally.errors:
        return
    console.print("[red]errors[/red]")
    for text, (count, line) in list(tally.errors.items())[:_SHOWN_ERRORS]:
        short = text if len(text) <= _SHOWN_ERROR_LENGTH else text[:_SHOWN_ERROR_LENGTH] + "…"
        where = f"line {line}" if count == 1 else f"line {line} and {count - 1:,} more"
        console.print(f"  {where}: {short}", markup=False, highlight=False)
    more = len(tally.errors) - _SHOWN_ERRORS
    if more > 0:
        console.print(f"  and {more:,} others; each row's own is in the output")


def _table(tally: Tally) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    rows = [
        ("rows answered", f"{tally.answered:,}"),
        ("rows failed", f"{tally.failed:,}"),
        ("rows answered before", f"{tally.skipped:,}"),
        ("prompt tokens", f"{tally.usage.prompt_tokens:,}"),
        ("generated tokens", f"{tally.usage.completion_tokens:,}"),
        ("generated tokens/s", f"{tally.tokens_per_second:,.1f}"),
        ("seconds", f"{tally.seconds:,.1f}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table
