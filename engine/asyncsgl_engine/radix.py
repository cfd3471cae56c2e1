"""The prefix tree: which token prefixes have their keys and values in which pages.

The idea is SGLang's RadixAttention (Zheng et al., 2024); here every node is one full page,
so nothing is ever split, and least recently used leaves are given up first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from .errors import InternalError
from .pages import PagePool

__all__ = ["Match", "Node", "PrefixTree"]

_COMPARED_SIBLINGS = 32


class Node:
    """One page of a cached prefix; the path from the root spells the prefix."""

    __slots__ = ("children", "key", "page", "parent", "used")

    def __init__(self, parent: Node | None, key: tuple[int, ...], page: int, used: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.used = used
        self.children: dict[tuple[int, ...], Node] = {}


class Match:
    """The longest cached prefix of some tokens.

    Args:
        node: where it ends in the tree.
        pages: the full pages it takes, in order.
        partial: a page whose first `partial_tokens` tokens go on with it, or None.
        partial_tokens: how many.
    """

    __slots__ = ("node", "pages", "partial", "partial_tokens")

    def __init__(
        self, node: Node, pages: list[int], partial: int | None, partial_tokens: int
    ) -> None:
        self.node = node
        self.pages = pages
        self.partial = partial
        self.partial_tokens = partial_tokens


class PrefixTree:
    """Token prefixes at page granularity, one tree for each salt.

    The tree holds each of its pages once in `pool`. A sequence that uses a page holds all
    pages before it too, so a page only the tree holds has no descendant in use.

    Args:
        pool: where pages are counted.
        page_size: tokens in a page.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._roots: dict[str | None, Node] = {}
        self._clock = 0
        self._leaves: list[tuple[int, int, Node]] = []
        self._pushes = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def root(self, salt: str | None) -> Node:
        """Where prefixes of `salt` begin."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(None, (), -1, 0)
        return root

    def match(self, tokens: Sequence[int], limit: int, salt: str | None, touch: bool) -> Match:
        """Find the longest cached prefix.

        Args:
            tokens: what is looked for.
            limit: most tokens of it that may be matched.
            salt: which tree.
            touch: whether this counts as use.
        """
        size = self._page_size
        node = self.root(salt)
        pages: list[int] = []
        end = size
        while end <= limit:
            child = node.children.get(tuple(tokens[end - size : end]))
            if child is None:
                break
            node = child
            pages.append(node.page)
            end += size
        done = end - size
        partial, length = self._best_sibling(node, tokens[done : min(limit, end)])
        if touch:
            self._touch(node)
        return Match(node, pages, partial, length)

    def _best_sibling(self, node: Node, tail: Sequence[int]) -> tuple[int | None, int]:
        best, best_length = None, 0
        if not tail:
            return None, 0
        for _, (key, child) in zip(
            range(_COMPARED_SIBLINGS), reversed(node.children.items()), strict=False
        ):
            if key[0] != tail[0]:
                continue
            length = 1
            while length < len(tail) and key[length] == tail[length]:
                length += 1
            if length > best_length:
                best, best_length = child.page, length
        return best, best_length

    def extend(self, node: Node, key: tuple[int, ...], page: int) -> Node:
        """Add a page after `node`, or find the one that is there already.

        Args:
            node: end of the prefix before.
            key: the page's tokens.
            page: a page the caller holds, taken into the tree if the tree has none.

        Returns:
            The child; its `page` differs from `page` where the tree had one.
        """
        child = node.children.get(key)
        if child is None:
            self._clock += 1
            child = Node(node, key, page, self._clock)
            node.children[key] = child
            self._pool.enter_tree(page)
            self._size += 1
            self._push(child)
        return child

    def evict(self, count: int) -> int:
        """Give up `count` pages that nothing else holds, least recently used leaves first.

        Returns:
            How many were freed; fewer when all the rest is in use.
        """
        freed = 0
        in_use: list[tuple[int, int, Node]] = []
        while freed < count and self._pool.cached and self._leaves:
            entry = heapq.heappop(self._leaves)
            node = entry[2]
            if node.children or node.parent is None or node.used != entry[0]:
                continue
            if not self._pool.only_in_tree(node.page):
                in_use.append(entry)
                continue
            self._remove(node)
            freed += 1
        for entry in in_use:
            heapq.heappush(self._leaves, entry)
        return freed

    def touch(self, node: Node) -> None:
        """Count as used just now the prefix that ends at `node`."""
        self._touch(node)

    def clear(self) -> None:
        """Give up every page. No sequence may go on extending the nodes it had."""
        for page in list(self.pages()):
            self._pool.leave_tree(page)
        self._roots.clear()
        self._leaves.clear()
        self._size = 0

    def pages(self) -> Iterator[int]:
        """All pages in the tree."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node.page
            stack.extend(node.children.values())

    def _remove(self, node: Node) -> None:
        parent = node.parent
        if parent is None or parent.children.pop(node.key) is not node:
            raise InternalError("a node of the prefix tree is not its parent's child")
        node.parent = None
        self._pool.leave_tree(node.page)
        self._size -= 1
        if parent.parent is not None and not parent.children:
            self._push(parent)

    def _touch(self, node: Node) -> None:
        self._clock += 1
        leaf = node
        while node.parent is not None:
            node.used = self._clock
            node = node.parent
        if leaf.parent is not None and not leaf.children:
            self._push(leaf)

    def _push(self, node: Node) -> None:
        self._pushes += 1
        heapq.heappush(self._leaves, (node.used, self._pushes, node))
        if len(self._leaves) > 4 * self._size + 64:
            self._leaves = [
                entry
                for entry in self._leaves
                if entry[2].used == entry[0] and entry[2].parent and not entry[2].children
            ]
            heapq.heapify(self._leaves)
