"""The prefix tree: which token prefixes have their keys and values in which pages.

The idea is SGLang's RadixAttention (Zheng et al., 2024); here every node is one page, so
nothing is ever split, and least recently used leaves are given up first. A page that is only
partly filled can be a leaf too, a *tail*: nothing grows on it, but its tokens can be copied.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from .errors import InternalError
from .pages import PagePool

__all__ = ["Node", "PrefixTree", "Start"]

_COMPARED_SIBLINGS = 32
_SPARE_ROOTS = 64
_NOBODY: frozenset[int] = frozenset()


class Node:
    """One page of a cached prefix; the path from the root spells the prefix."""

    __slots__ = ("children", "key", "live", "page", "parent", "salt", "used")

    def __init__(
        self, parent: Node | None, key: tuple[int, ...], page: int, used: int, salt: str | None
    ) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.used = used
        self.salt = salt
        self.live = True
        self.children: dict[tuple[int, ...], Node] = {}


class Start(NamedTuple):
    """The best page to copy the beginning of the next page from.

    Args:
        node: whose page it is, or None.
        tokens: how many of its first tokens are wanted.
        coming: how many a page offers that is being computed right now, and cannot be copied.
    """

    node: Node | None
    tokens: int
    coming: int


class PrefixTree:
    """Token prefixes at page granularity, one tree for each salt.

    The tree holds each of its pages once in `pool`. A sequence that uses a page holds all
    pages before it too, so a page only the tree holds has no descendant in use.

    Whoever stops holding a node's page calls `touch` on that node, or it is never evicted.

    Args:
        pool: where pages are counted.
        page_size: tokens in a page.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._roots: dict[str | None, Node] = {}
        self._clock = 0
        # (time of use, tie-breaker, leaf); entries of another time than their leaf's are stale.
        self._leaves: list[tuple[int, int, Node]] = []
        self._pushes = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def root(self, salt: str | None) -> Node:
        """Where prefixes of `salt` begin."""
        root = self._roots.get(salt)
        if root is None:
            if len(self._roots) >= 2 * self._size + _SPARE_ROOTS:
                self._drop_empty_roots()
            root = self._roots[salt] = Node(None, (), -1, 0, salt)
        return root

    def descend(
        self, node: Node, depth: int, tokens: Sequence[int], limit: int
    ) -> tuple[Node, int]:
        """Follow tokens from a node down, page by page.

        Args:
            node: a live node, or a root.
            depth: pages of `tokens` that lead to it.
            tokens: what is looked for, from its beginning.
            limit: most tokens of it that may be matched.

        Returns:
            The last node on the way, and the pages that lead to it.
        """
        size = self._page_size
        end = (depth + 1) * size
        while end <= limit:
            child = node.children.get(tuple(tokens[end - size : end]))
            if child is None:
                break
            node = child
            end += size
        return node, end // size - 1

    def start(self, node: Node, tail: Sequence[int], computing: Container[int] = _NOBODY) -> Start:
        """Find the page after `node` that has most tokens in common with `tail`.

        Args:
            node: where the full pages end.
            tail: the tokens that follow.
            computing: pages whose contents are not there yet.
        """
        best, most, coming = None, 0, 0
        if not tail or not node.children:
            return Start(None, 0, 0)
        for key, child in islice(reversed(node.children.items()), _COMPARED_SIBLINGS):
            if key[0] != tail[0] or (length := _common(key, tail)) <= most:
                continue
            if child.page in computing:
                coming = max(coming, length)
            else:
                best, most = child, length
        return Start(best, most, max(coming, most))

    def path(self, node: Node) -> list[int]:
        """The pages from the root to `node`."""
        pages = []
        while node.parent is not None:
            pages.append(node.page)
            node = node.parent
        pages.reverse()
        return pages

    def unheld(self, node: Node) -> int:
        """Pages on the path to `node` that only the tree holds."""
        count = 0
        while node.parent is not None and self._pool.only_in_tree(node.page):
            count += 1
            node = node.parent
        return count

    def extend(self, node: Node, key: tuple[int, ...], page: int) -> Node:
        """Add a page after `node`, or find the one that is there already.

        Args:
            node: end of the prefix before.
            key: the page's tokens; fewer than a page's make a tail.
            page: a page the caller holds, taken into the tree if the tree has none.

        Returns:
            The child; its `page` differs from `page` where the tree had one.
        """
        if not node.live:
            if node.page >= 0:
                raise InternalError("a prefix is extended that is no longer in the tree")
            node = self.root(node.salt)
        child = node.children.get(key)
        if child is None:
            self._clock += 1
            child = Node(node, key, page, self._clock, node.salt)
            self._age_tails(node, key)
            node.children[key] = child
            self._pool.enter_tree(page)
            self._size += 1
            self._push(child)
        return child

    def withdraw(self, node: Node) -> None:
        """Take a leaf out of the tree, whoever holds its page."""
        parent = node.parent
        if parent is None or node.children or parent.children.pop(node.key, None) is not node:
            raise InternalError("a node of the prefix tree is not its parent's leaf")
        node.parent = None
        node.live = False
        self._pool.leave_tree(node.page)
        self._size -= 1
        if parent.parent is not None and not parent.children:
            self._push(parent)

    def evict(self, count: int) -> int:
        """Give up `count` pages that nothing else holds, least recently used leaves first.

        Returns:
            How many were freed; fewer when all the rest is in use.
        """
        freed = 0
        while freed < count and self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            if node.used != used or not node.live or node.children:
                continue
            # A leaf in use comes back with the `touch` of whoever lets go of it.
            if self._pool.only_in_tree(node.page):
                self.withdraw(node)
                freed += 1
        return freed

    def prune(self, node: Node) -> None:
        """Give up a leaf and what is above it, as far as nothing else needs that."""
        while node.parent is not None and not node.children and self._pool.only_in_tree(node.page):
            parent = node.parent
            self.withdraw(node)
            node = parent

    def touch(self, node: Node) -> None:
        """Count as used just now the prefix that ends at `node`."""
        self._clock += 1
        above: Node | None = node
        while above is not None:
            above.used = self._clock
            above = above.parent
        if node.parent is not None and not node.children:
            self._push(node)

    def clear(self) -> None:
        """Give up every page. No sequence may go on extending the nodes it had."""
        for node in list(self._nodes()):
            node.live = False
            node.parent = None
            self._pool.leave_tree(node.page)
        for root in self._roots.values():
            root.live = False
        self._roots.clear()
        self._leaves.clear()
        self._size = 0

    def pages(self) -> Iterator[int]:
        """All pages in the tree."""
        return (node.page for node in self._nodes())

    def check(self) -> None:
        """Prove that whatever can be evicted will be found.

        Raises:
            InternalError: a leaf is lost, or pages are counted wrongly.
        """
        queued = {id(node) for used, _, node in self._leaves if node.used == used}
        count = 0
        for node in self._nodes():
            count += 1
            if node.children and len(node.key) < self._page_size:
                raise InternalError(f"page {node.page} is not full but has pages after it")
            lost = not node.children and id(node) not in queued
            if lost and self._pool.only_in_tree(node.page):
                raise InternalError(f"page {node.page} would never be evicted")
        if count != self._size:
            raise InternalError(f"the prefix tree has {count} pages and counts {self._size}")

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def _age_tails(self, node: Node, key: tuple[int, ...]) -> None:
        """What is the beginning of a new page is worth nothing more: let it go first."""
        for other, child in islice(reversed(node.children.items()), _COMPARED_SIBLINGS):
            if len(other) < len(key) and key[: len(other)] == other:
                child.used = 0
                self._push(child)

    def _drop_empty_roots(self) -> None:
        for salt, root in list(self._roots.items()):
            if not root.children:
                root.live = False
                del self._roots[salt]

    def _push(self, node: Node) -> None:
        self._pushes += 1
        heapq.heappush(self._leaves, (node.used, self._pushes, node))
        if len(self._leaves) > 4 * self._size + 64:
            self._leaves = [
                entry
                for entry in self._leaves
                if entry[2].used == entry[0] and entry[2].live and not entry[2].children
            ]
            heapq.heapify(self._leaves)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length
