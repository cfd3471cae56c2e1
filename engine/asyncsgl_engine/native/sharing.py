"""Finds rows of a step whose first pages are the same, so that these are attended once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Groups", "find_groups"]

_WORTH = 128

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows by what they share.

    Args:
        members: every row once, group by group, then those of no group; (rows,).
        first: where each group begins in `members`, and where the last ends; (groups + 1,).
        common: leading positions that all members of a group have in the same pages; (groups,).
    """

    members: Ints
    first: Ints
    common: Ints


def find_groups(table: npt.NDArray[np.int32], lengths: Ints, page_size: int) -> Groups:
    """Group rows that begin with the same pages.

    Args:
        table: page ids of each row; what is past a row's pages may be anything; (rows, pages).
        lengths: positions of each row; (rows,).
        page_size: positions in a page.
    """
    rows = len(lengths)
    if rows < 2 or table.shape[1] == 0:
        return Groups(np.arange(rows), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    order = np.argsort(table[:, 0], kind="stable")
    ordered = table[order]
    differ = ordered[1:] != ordered[:-1]
    same = np.where(differ.any(1), differ.argmax(1), table.shape[1])  # with the row before
    starts = np.flatnonzero(np.concatenate(([True], same == 0)))
    sizes = np.diff(np.append(starts, rows))
    whole = np.append(table.shape[1], same)
    whole[starts] = table.shape[1]
    pages = np.minimum.reduceat(whole, starts)
    full = np.minimum.reduceat((lengths[order] - 1) // page_size, starts)
    common = np.minimum(pages, full) * page_size
    kept = (sizes > 1) & (common * (sizes - 1) >= _WORTH)
    grouped = np.repeat(kept, sizes)
    members = np.concatenate((order[grouped], order[~grouped]))
    first = np.concatenate(([0], np.cumsum(sizes[kept])))
    return Groups(members, first.astype(np.int64), common[kept].astype(np.int64))
