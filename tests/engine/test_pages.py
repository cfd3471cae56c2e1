"""Page counts."""

from __future__ import annotations

import pytest

from asyncsgl_engine.errors import InternalError
from asyncsgl_engine.pages import PagePool


def test_pages_are_free_held_or_cached() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(), pool.allocate()
    assert first is not None
    assert second is not None
    pool.enter_tree(first)
    assert (pool.free, pool.held, pool.cached) == (1, 2, 0)
    pool.release([first])
    assert (pool.free, pool.held, pool.cached) == (1, 1, 1)
    pool.retain([first])
    assert (pool.free, pool.held, pool.cached) == (1, 2, 0)
    pool.leave_tree(first)
    pool.release([first, second])
    assert (pool.free, pool.held, pool.cached) == (3, 0, 0)
    pool.check([], [])


def test_an_empty_pool_gives_none() -> None:
    pool = PagePool(1)
    assert pool.allocate() == 0
    assert pool.allocate() is None


def test_releasing_twice_and_sharing_a_free_page_are_bugs() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    assert page is not None
    pool.release([page])
    with pytest.raises(InternalError, match="released more often"):
        pool.release([page])
    with pytest.raises(InternalError, match="cannot be shared"):
        pool.retain([1])


def test_check_names_pages_whose_count_is_wrong() -> None:
    pool = PagePool(4)
    page = pool.allocate()
    assert page is not None
    pool.check([[page]], [])
    with pytest.raises(InternalError, match=rf"\[{page}\]"):
        pool.check([], [])
    with pytest.raises(InternalError, match="not held as often"):
        pool.check([[page], [page]], [])
