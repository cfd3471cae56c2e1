"""Finds the sequences that make steps fail, so that no others suffer for them."""

from __future__ import annotations

from collections.abc import Sequence as Several

from .sequence import Sequence

__all__ = ["Trial"]


class Trial:
    """Suspects of a step that failed, tried apart: in halves, down to single ones.

    A suspect is acquitted by steps that compute without failing what it had when it was
    accused. Of n suspects with one culprit, about 2 log2(n) groups are tried.
    """

    def __init__(self) -> None:
        self._groups: list[list[Sequence]] = []  # the last one is tried next
        self._goals: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def group(self) -> Several[Sequence]:
        """Whose turn it is; empty when all is known."""
        return self._groups[-1] if self._groups else ()

    def accuse(self, sequences: Several[Sequence], others: bool = False) -> Sequence | None:
        """Take in that a step over these failed.

        Args:
            sequences: the suspects.
            others: whether more were in it, which have ended since.

        Returns:
            The culprit, if it was alone.
        """
        for sequence in sequences:
            self.acquit(sequence)
        if len(sequences) == 1 and not others:
            return sequences[0]
        half = len(sequences) // 2
        for part in (sequences[half:], sequences[:half]):
            if part:
                self._groups.append(list(part))
        self._goals |= {sequence.serial: len(sequence.tokens) for sequence in sequences}
        return None

    def passed(self, sequence: Sequence, end: int) -> None:
        """Take in that a step computed the tokens before `end` of a sequence."""
        if end >= self._goals.get(sequence.serial, end + 1):
            self.acquit(sequence)

    def acquit(self, sequence: Sequence) -> None:
        """Let go of a sequence, suspect or not."""
        if self._goals.pop(sequence.serial, None) is not None:
            for group in self._groups:
                if sequence in group:
                    group.remove(sequence)
            self._groups = [group for group in self._groups if group]
