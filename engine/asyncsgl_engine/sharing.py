"""How sequences get pages, and share those whose tokens they have in common."""

from __future__ import annotations

from .config import ResolvedConfig
from .pages import PagePool
from .plan import PageCopy
from .radix import Node, PrefixTree, Start
from .sequence import Sequence

__all__ = ["Leaders", "Sharing"]

_WORTH_COPYING = 4

Leaders = set[tuple[int, tuple[int, ...]]]
"""Pages about to be filled: the identity of the node before, and the page's tokens."""


class Sharing:
    """Pages and the prefix tree, as sequences use them.

    A waiting sequence's `node` and `node_pages` say how far the tree goes along with it; a
    running one's, which of its own pages are in the tree.

    Args:
        config: sizes, and whether prefixes are shared at all.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self._size = config.page_size
        self.enabled = config.radix_cache
        self.pool = PagePool(config.num_pages)
        self.tree = PrefixTree(self.pool, config.page_size)

    def missing(self, sequence: Sequence) -> int:
        """Pages a sequence still needs for the tokens it has, and one to grow into."""
        return -(-sequence.length // self._size) + 1 - len(sequence.pages)

    def room(self, sequence: Sequence, wanted: int) -> int:
        """Take pages for `wanted` more tokens; how many of them now have a place."""
        size, pages = self._size, sequence.pages
        missing = -(-(sequence.computed + wanted) // size) - len(pages)
        if missing > self.pool.free:
            self.tree.evict(missing - self.pool.free)
        for _ in range(missing):
            page = self.pool.allocate()
            if page is None:
                break
            pages.append(page)
        return min(wanted, len(pages) * size - sequence.computed)

    # -- what others have computed -------------------------------------------------------------

    def seek(self, sequence: Sequence) -> None:
        """Bring up to date how far the tree goes along with a waiting sequence."""
        if not self.enabled or sequence.request.no_cache:
            return
        node, depth = sequence.node, sequence.node_pages
        if node is None or not node.live:
            node, depth = self.tree.root(sequence.request.cache_salt), 0
        limit = self._usable(sequence)
        sequence.node, sequence.node_pages = self.tree.descend(node, depth, sequence.keys, limit)

    def start(self, sequence: Sequence, computing: set[int]) -> Start:
        """What the tree has of a waiting sequence's next page; it was sought just before."""
        if sequence.node is None:
            return Start(None, 0, 0)
        at = sequence.node_pages * self._size
        tail = sequence.keys[at : min(self._usable(sequence), at + self._size)]
        return self.tree.start(sequence.node, tail, computing)

    def take(self, sequence: Sequence, computing: set[int]) -> PageCopy | None:
        """Give a sequence that is to run the pages that the tree has of it.

        Returns:
            What must be copied to a page of its own, if anything.
        """
        node = sequence.node
        if node is None:
            return None
        start = self.start(sequence, computing)
        sequence.pages = self.tree.path(node)
        self.pool.retain(sequence.pages)
        self.tree.touch(node)
        sequence.computed = len(sequence.pages) * self._size
        if start.node is None or start.tokens < _WORTH_COPYING:
            return None
        return self._copy(sequence, start.node, start.tokens)

    def _copy(self, sequence: Sequence, source: Node, tokens: int) -> PageCopy | None:
        copy = None
        self.pool.retain((source.page,))  # making room must not evict it
        if self.room(sequence, tokens) == tokens:
            copy = PageCopy(source.page, sequence.pages[-1], tokens)
            sequence.computed += tokens
        self.pool.release((source.page,))
        self.tree.touch(source)
        return copy

    def _usable(self, sequence: Sequence) -> int:
        """Most tokens that may be found: the last one is computed, and all that are scored."""
        limit = len(sequence.tokens) - 1
        return min(limit, sequence.scored) if sequence.owes_scores else limit

    # -- what others are computing -------------------------------------------------------------

    def lead(self, sequence: Sequence, leaders: Leaders) -> None:
        """Note the page that a sequence in prefill will fill after this step."""
        node, at = sequence.node, sequence.node_pages * self._size
        end = min(sequence.goal, len(sequence.tokens))
        if node is not None and sequence.due and at + self._size <= end:
            leaders.add((id(node), tuple(sequence.keys[at : at + self._size])))

    def led(self, sequence: Sequence, leaders: Leaders) -> bool:
        """Whether a running sequence is about to compute the next page for a waiting one."""
        if sequence.node is None or not leaders:
            return False
        at = sequence.node_pages * self._size
        end = at + self._size
        if end > self._usable(sequence):
            return False
        return (id(sequence.node), tuple(sequence.keys[at:end])) in leaders

    def coming(self, sequence: Sequence, computing: set[int]) -> int:
        """Tokens that a waiting sequence could copy after this step, but not before it."""
        if not computing:
            return 0
        start = self.start(sequence, computing)
        gain = start.coming - start.tokens
        return gain if gain >= _WORTH_COPYING else 0

    # -- what a sequence gives to others -------------------------------------------------------

    def share(self, sequence: Sequence, computing: set[int]) -> int:
        """Put pages that are full into the tree, once their tokens are known.

        Args:
            computing: takes the pages whose contents are there only after the step.

        Returns:
            The first index of the sequence's pages that changed: another's page takes the
            place of one with the same tokens.
        """
        node, pages = sequence.node, sequence.pages
        size, changed, index = self._size, len(pages), sequence.node_pages
        settled = sequence.settled
        if node is None or (index + 1) * size > settled:
            return changed
        self._lift_tail(sequence)
        while (index + 1) * size <= settled:
            key = tuple(sequence.keys[index * size : (index + 1) * size])
            own = pages[index]
            node = self.tree.extend(node, key, own)
            if node.page == own:
                computing.add(own)
            else:
                self.pool.retain((node.page,))
                self.pool.release((own,))
                pages[index] = node.page
                changed = min(changed, index)
            index += 1
        sequence.node, sequence.node_pages = node, index
        return changed

    def lay_tail(self, sequence: Sequence) -> int | None:
        """Let others copy from the page that a sequence has only partly filled.

        Returns:
            The page, if it was put into the tree.
        """
        node, at = sequence.node, sequence.node_pages * self._size
        count = sequence.settled - at
        if node is None or count < _WORTH_COPYING:
            return None
        if sequence.tail is not None and len(sequence.tail.key) == count:
            return None
        self._lift_tail(sequence)
        key = tuple(sequence.keys[at : at + count])
        if self.tree.start(node, key).tokens == count:
            return None
        page = sequence.pages[sequence.node_pages]
        tail = self.tree.extend(node, key, page)
        if tail.page != page:
            return None
        sequence.tail = tail
        return page

    def settle(self, sequence: Sequence, keep: bool = True) -> None:
        """Take a sequence's pages back; the tree keeps those that others may want.

        Args:
            keep: else the tree gives up those that no other sequence has used.
        """
        node = sequence.node
        if node is not None:
            if keep:
                self.share(sequence, set())
                self.lay_tail(sequence)
            self.tree.touch(sequence.tail or sequence.node or node)
        last = sequence.tail or sequence.node
        self.pool.release(sequence.pages)
        if last is not None and not keep:
            self.tree.prune(last)
        sequence.pages = []
        sequence.computed = sequence.synced = sequence.node_pages = 0
        sequence.node = sequence.tail = None

    def _lift_tail(self, sequence: Sequence) -> None:
        if sequence.tail is not None:
            self.tree.withdraw(sequence.tail)
            sequence.tail = None
