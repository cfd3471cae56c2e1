"""How many tokens have to be computed when no common prefix is computed twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["Seen"]


class Seen:
    """A tree of all the token sequences so far: a cache without a limit.

    Its answer is the most that any prefix cache could save on the same sequences.
    """

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        """Tokens in the tree: those that had to be computed."""
        return len(self._children)

    def add(self, tokens: Iterable[int]) -> int:
        """Take a sequence in; returns how many of its first tokens were known."""
        node = known = 0
        for token in tokens:
            below = self._children.get((node, token))
            if below is None:
                below = len(self._children) + 1
                self._children[node, token] = below
            else:
                known += 1
            node = below
        return known

    def known(self, tokens: Sequence[int]) -> int:
        """How many of a sequence's first tokens are in the tree."""
        node = 0
        for count, token in enumerate(tokens):
            below = self._children.get((node, token))
            if below is None:
                return count
            node = below
        return len(tokens)
