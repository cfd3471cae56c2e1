"""The prefix tree against a plain list of prefixes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncsgl_engine.pages import PagePool
from asyncsgl_engine.radix import PrefixTree

texts = st.lists(st.lists(st.integers(0, 1), max_size=24), min_size=1, max_size=12)


def insert(tree: PrefixTree, pool: PagePool, tokens: list[int], size: int) -> None:
    """Cache a sequence's full pages the way a sequence that ran and ended leaves them."""
    node, held = tree.root(None), []
    for start in range(0, len(tokens) - size + 1, size):
        page = pool.allocate()
        assert page is not None
        node = tree.extend(node, tuple(tokens[start : start + size]), page)
        if node.page != page:
            pool.retain([node.page])
            pool.release([page])
        held.append(node.page)
    pool.release(held)


@given(cached=texts, wanted=st.lists(st.integers(0, 1), max_size=24), size=st.integers(1, 4))
def test_a_match_is_the_longest_cached_prefix(
    cached: list[list[int]], wanted: list[int], size: int
) -> None:
    pool = PagePool(400)
    tree = PrefixTree(pool, size)
    for tokens in cached:
        insert(tree, pool, tokens, size)
    pool.check([], tree.pages())
    match = tree.match(wanted, len(wanted), None, touch=True)
    found = len(match.pages) * size + match.partial_tokens
    best = 0
    for tokens in cached:
        whole = tokens[: len(tokens) // size * size]
        while best < min(len(whole), len(wanted)) and whole[: best + 1] == wanted[: best + 1]:
            best += 1
    assert found == best
    assert tree.match(wanted, best, "other salt", touch=False).pages == []


@given(cached=texts, keep=st.integers(0, 40), size=st.integers(1, 3))
def test_eviction_frees_leaves_and_keeps_prefixes_whole(
    cached: list[list[int]], keep: int, size: int
) -> None:
    pool = PagePool(400)
    tree = PrefixTree(pool, size)
    for tokens in cached:
        insert(tree, pool, tokens, size)
    before = len(tree)
    asked = max(before - keep, 0)
    assert tree.evict(asked) == asked
    assert len(tree) == len(list(tree.pages())) == before - asked
    pool.check([], tree.pages())
    assert tree.evict(1000) == before - asked
    assert pool.free == 400


def test_the_least_recently_used_goes_first() -> None:
    pool = PagePool(10)
    tree = PrefixTree(pool, 2)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        insert(tree, pool, tokens, 2)
    tree.match([1, 1], 2, None, touch=True)
    tree.match([2, 2], 2, None, touch=False)
    tree.evict(2)
    found = [len(tree.match([t, t], 2, None, touch=False).pages) for t in (1, 2, 3)]
    assert found == [1, 0, 0]


def test_pages_in_use_are_not_evicted() -> None:
    pool = PagePool(10)
    tree = PrefixTree(pool, 2)
    insert(tree, pool, [1, 1, 2, 2], 2)
    match = tree.match([1, 1], 2, None, touch=True)
    pool.retain(match.pages)
    assert tree.evict(10) == 1
    assert (pool.held, pool.cached) == (1, 0)
    pool.release(match.pages)
    assert tree.evict(10) == 1
