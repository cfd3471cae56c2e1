"""The results as tables in Markdown and as one JSON value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.peers.finding import OURS
from benchmarks.peers.result import Result

__all__ = ["phases", "rates", "ratios", "same_outputs", "shares", "table"]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(first: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        first: heads the first column.
        columns: heads of the others.
        rows: cells, the first column's with them.
    """
    lines = [_row([first, *columns]), "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(_row(row) for row in rows)])


class _Grid:
    """Results by team and by workload, in the order in which they came."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._cells: dict[tuple[str, str], Result] = {}
        for result in results:
            self._cells[f"{result.team} {result.dtype}", result.workload] = result
        self.sides = list(dict.fromkeys(side for side, _ in self._cells))
        self.workloads = sorted({workload for _, workload in self._cells})

    def get(self, side: str, workload: str) -> Result | None:
        return self._cells.get((side, workload))

    def rate(self, side: str, workload: str) -> float | None:
        result = self.get(side, workload)
        return result.rate if result is not None else None


def _speed(result: Result | None, most_foreign: float) -> str:
    if result is None:
        return ""
    if result.error is not None or result.rate is None:
        return "failed"
    return f"{result.rate:.1f}" + ("*" if result.disturbed(most_foreign) else "")


def rates(results: Sequence[Result], most_foreign: float) -> str:
    """Output tokens a second; a star marks what other processes disturbed."""
    grid = _Grid(results)
    rows = [
        [side, *(_speed(grid.get(side, name), most_foreign) for name in grid.workloads)]
        for side in grid.sides
    ]
    return table("output tokens/s", grid.workloads, rows)


def ratios(results: Sequence[Result]) -> str:
    """Our rate over each peer's, above 1 where we are faster; then over the best of them."""
    grid = _Grid(results)
    rows = []
    for dtype in dict.fromkeys(result.dtype for result in results):
        ours = f"{OURS} {dtype}"
        peers = [s for s in grid.sides if s != ours and s.endswith(f" {dtype}")]
        rows += [
            [side, *(_ratio(grid, ours, [side], name) for name in grid.workloads)] for side in peers
        ]
        if len(peers) > 1:
            best = (_ratio(grid, ours, peers, name) for name in grid.workloads)
            rows.append([f"best of these, {dtype}", *best])
    return table("ours over", grid.workloads, rows)


def _ratio(grid: _Grid, ours: str, sides: Iterable[str], workload: str) -> str:
    mine = grid.rate(ours, workload)
    theirs = [rate for side in sides if (rate := grid.rate(side, workload)) is not None]
    return f"{mine / max(theirs):.2f}" if mine is not None and theirs else "-"


def same_outputs(results: Sequence[Result]) -> str:
    """How many requests got the same tokens from us and from each peer."""
    grid = _Grid(results)
    rows = [
        [side, *(_same(grid.get(side, name)) for name in grid.workloads)]
        for side in grid.sides
        if not side.startswith(f"{OURS} ")
    ]
    return table("same tokens as ours", grid.workloads, rows)


def _same(result: Result | None) -> str:
    if result is None or result.same is None:
        return "-"
    return f"{result.same} of {result.requests}"


def shares(results: Sequence[Result], bounds: dict[str, float]) -> str:
    """Rates over what the machine allows at most.

    Args:
        results: of all teams.
        bounds: output tokens a second by dtype and workload, as `bfloat16 A`.
    """
    grid = _Grid(results)
    rows = []
    for dtype in dict.fromkeys(result.dtype for result in results):
        limits = [bounds.get(f"{dtype} {name}") for name in grid.workloads]
        shown = (f"{limit:.1f}" if limit is not None else "-" for limit in limits)
        rows.append([f"bound, {dtype}, tokens/s", *shown])
        for side in grid.sides:
            if side.endswith(f" {dtype}"):
                each = [grid.rate(side, name) for name in grid.workloads]
                rows.append([side, *(_percent(a, b) for a, b in zip(each, limits, strict=True))])
    return table("share of the bound", grid.workloads, rows)


def _percent(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.0%}" if part is not None and whole is not None else "-"


def phases(results: Sequence[Result]) -> str:
    """Where the engine's thread spent its time."""
    seen = [result for result in results if result.phases]
    names = list(dict.fromkeys(name for result in seen for name in result.phases))
    rows = [[name, *(f"{result.phases.get(name, 0.0):.1%}" for result in seen)] for name in names]
    return table("phase", [f"{result.workload} {result.dtype}" for result in seen], rows)
