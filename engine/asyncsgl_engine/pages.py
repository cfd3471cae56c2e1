"""Which pages of the KV cache are in use, and by how many holders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .errors import InternalError

__all__ = ["PagePool"]


class PagePool:
    """Page ids 0 to `num_pages` - 1 with reference counts.

    A page is free (no holder), cached (the prefix tree is its only holder) or held
    (sequences hold it).

    Args:
        num_pages: how many there are.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._in_tree = bytearray(num_pages)
        self._cached = 0

    def __repr__(self) -> str:
        return f"<PagePool free={self.free} cached={self.cached} held={self.held}>"

    @property
    def free(self) -> int:
        """Pages without a holder."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that only the tree holds."""
        return self._cached

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - len(self._free) - self._cached

    def allocate(self) -> int | None:
        """Take a free page, the caller its only holder; None when there is none."""
        if not self._free:
            return None
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def retain(self, pages: Iterable[int]) -> None:
        """Become one more holder of each page."""
        holders = self._holders
        for page in pages:
            if holders[page] == 0:
                raise InternalError(f"page {page} is free and cannot be shared")
            if holders[page] == 1 and self._in_tree[page]:
                self._cached -= 1
            holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Stop holding each page; the last holder's release frees it."""
        holders = self._holders
        for page in pages:
            left = holders[page] - 1
            if left < 0 or (left == 0 and self._in_tree[page]):
                raise InternalError(f"page {page} is released more often than it was taken")
            holders[page] = left
            if left == 0:
                self._free.append(page)
            elif left == 1 and self._in_tree[page]:
                self._cached += 1

    def enter_tree(self, page: int) -> None:
        """The tree becomes a holder of a page that a sequence holds."""
        if self._in_tree[page]:
            raise InternalError(f"page {page} is in the prefix tree already")
        self.retain((page,))
        self._in_tree[page] = 1

    def leave_tree(self, page: int) -> None:
        """The tree gives the page up; it is freed unless sequences hold it."""
        if not self._in_tree[page]:
            raise InternalError(f"page {page} is not in the prefix tree")
        if self._holders[page] == 1:
            self._cached -= 1
        self._in_tree[page] = 0
        self.release((page,))

    def only_in_tree(self, page: int) -> bool:
        """Whether the tree is the page's only holder."""
        return bool(self._in_tree[page]) and self._holders[page] == 1

    def check(self, holders: Iterable[Sequence[int]], tree: Iterable[int]) -> None:
        """Prove that the counts equal what the holders say.

        Args:
            holders: the pages of each sequence.
            tree: the pages of the prefix tree.

        Raises:
            InternalError: a count is wrong; the message names the pages.
        """
        expected = Counter(page for pages in holders for page in pages)
        in_tree = set(tree)
        expected.update(in_tree)
        wrong = [page for page in range(self.num_pages) if self._holders[page] != expected[page]]
        if wrong:
            raise InternalError(f"pages {wrong[:8]} are not held as often as counted")
        if in_tree != {page for page, there in enumerate(self._in_tree) if there}:
            raise InternalError("the pages marked as cached are not those of the prefix tree")
        if sorted(self._free) != [page for page in range(self.num_pages) if not expected[page]]:
            raise InternalError("the list of free pages is not the pages without a holder")
        if self._cached != sum(self._holders[page] == 1 for page in in_tree):
            raise InternalError("the count of cached pages is wrong")
