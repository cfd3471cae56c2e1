"""The prefix tree against a plain list of prefixes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncsgl_engine.pages import PagePool
from asyncsgl_engine.radix import Node, PrefixTree

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
    tree.touch(node)


def find(tree: PrefixTree, tokens: list[int]) -> Node:
    """Where a text's full pages end in the tree."""
    return tree.descend(tree.root(None), 0, tokens, len(tokens))[0]


@given(cached=texts, wanted=st.lists(st.integers(0, 1), max_size=24), size=st.integers(1, 4))
def test_a_match_is_the_longest_cached_prefix(
    cached: list[list[int]], wanted: list[int], size: int
) -> None:
    pool = PagePool(400)
    tree = PrefixTree(pool, size)
    for tokens in cached:
        insert(tree, pool, tokens, size)
    pool.check([], tree.pages())
    tree.check()
    node, depth = tree.descend(tree.root(None), 0, wanted, len(wanted))
    assert len(tree.path(node)) == depth
    found = depth * size + tree.start(node, wanted[depth * size :]).tokens
    best = 0
    for tokens in cached:
        whole = tokens[: len(tokens) // size * size]
        while best < min(len(whole), len(wanted)) and whole[: best + 1] == wanted[: best + 1]:
            best += 1
    assert found == best
    assert tree.descend(tree.root("other salt"), 0, wanted, best)[1] == 0


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
    tree.touch(find(tree, [1, 1]))
    find(tree, [2, 2])
    tree.evict(2)
    found = [len(tree.path(find(tree, [t, t]))) for t in (1, 2, 3)]
    assert found == [1, 0, 0]


def test_pages_in_use_are_not_evicted() -> None:
    pool = PagePool(10)
    tree = PrefixTree(pool, 2)
    insert(tree, pool, [1, 1, 2, 2], 2)
    node = find(tree, [1, 1])
    assert tree.unheld(node) == 1
    pool.retain(tree.path(node))
    assert tree.unheld(node) == 0
    assert tree.evict(10) == 1
    assert (pool.held, pool.cached) == (1, 0)
    pool.release(tree.path(node))
    tree.touch(node)
    tree.check()
    assert tree.evict(10) == 1


def test_a_tail_can_be_copied_from_but_nothing_grows_on_it() -> None:
    pool = PagePool(10)
    tree = PrefixTree(pool, 4)
    insert(tree, pool, [1, 1, 1, 1], 4)
    end = find(tree, [1, 1, 1, 1])
    page = pool.allocate()
    assert page is not None
    tail = tree.extend(end, (2, 2, 2), page)
    assert tree.start(end, [2, 2, 3]) == (tail, 2, 2)
    assert tree.start(end, [2, 2, 3], {page}) == (None, 0, 2)
    assert tree.start(end, [3]) == (None, 0, 0)
    assert tree.descend(end, 1, [1, 1, 1, 1, 2, 2, 2, 9], 8) == (end, 1)
    tree.withdraw(tail)
    pool.release([page])
    tree.check()
    assert tree.start(end, [2, 2, 3]).node is None
    assert (pool.free, pool.cached) == (9, 1)


def test_a_tail_that_a_page_covers_goes_first() -> None:
    pool = PagePool(10)
    tree = PrefixTree(pool, 4)
    insert(tree, pool, [5, 5, 5, 5], 4)
    for key in ((1, 2, 3), (1, 2, 3, 4)):
        page = pool.allocate()
        assert page is not None
        tree.touch(tree.extend(tree.root(None), key, page))
        pool.release([page])
    tree.evict(1)
    assert len(tree.path(find(tree, [1, 2, 3, 4]))) == 1
    assert len(tree.path(find(tree, [5, 5, 5, 5]))) == 1


def test_salts_that_left_nothing_are_forgotten() -> None:
    tree = PrefixTree(PagePool(4), 2)
    lasting = tree.root("mine")
    page = tree._pool.allocate()
    assert page is not None
    for number in range(10_000):
        tree.root(f"salt {number}")
    assert len(tree._roots) < 100
    # Whoever still holds a root that was forgotten finds its prefixes under the new one.
    tree.extend(lasting, (1, 1), page)
    assert tree.descend(tree.root("mine"), 0, [1, 1], 2)[1] == 1


def test_evicting_from_a_full_tree_does_not_look_through_it() -> None:
    """Counts heap operations instead of seconds: pages in use are not looked at again."""
    pool = PagePool(30_000)
    tree = PrefixTree(pool, 1)
    held: list[Node] = []
    for number in range(30_000):
        page = pool.allocate()
        assert page is not None
        node = tree.extend(tree.root(None), (number,), page)
        if number < 15_000:
            held.append(node)
        else:
            pool.release([page])
    assert tree.evict(1) == 1
    left = len(tree._leaves)
    assert tree.evict(100) == 100
    assert left - len(tree._leaves) == 100
    for node in held:
        pool.release([node.page])
        tree.touch(node)
    tree.check()
