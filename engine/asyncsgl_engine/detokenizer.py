"""Token ids → text as they come, never half a character.

Two ways, chosen by the tokenizer's decoder. Byte-level vocabularies: each token is some bytes,
whatever stands beside it, so bytes are looked up and decoded as UTF-8 step by step. All others: the
text of a token depends on its neighbours (a space that is dropped at the start, bytes spelled
`<0xE6>` one a token), so a short window of tokens is decoded again and the growth is taken.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["ByteDecoder", "ByteTable", "IncrementalDecoder", "WindowDecoder"]

ByteTable = Callable[[int], bytes]
"""A token id's bytes; none for a token that is left out."""


class IncrementalDecoder(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens.

        Args:
            ids: the next token ids.

        Returns:
            The text that is certain now and was not returned before. All returned text, with
            `flush` at the end, is the text of decoding all ids at once.
        """
        ...

    def flush(self) -> str:
        """End the sequence.

        Returns:
            What was held back; an unfinished character comes as U+FFFD.
        """
        ...


class ByteDecoder:
    """For byte-level vocabularies.

    Args:
        table: the bytes of each token.
    """

    __slots__ = ("_codec", "_table")

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._codec = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """See `IncrementalDecoder.push`."""
        return self._codec.decode(b"".join(map(self._table, ids)))

    def flush(self) -> str:
        """See `IncrementalDecoder.flush`."""
        return self._codec.decode(b"", final=True)


class WindowDecoder:
    """For all other vocabularies.

    Args:
        decode: tokens → text, all of them, as at the start of a text.
        keeps: whether a token is part of the text (special tokens may not be).
        spells_byte: whether a token stands for one byte. A run of such tokens is decoded as a
            whole, so it is held back until another token ends it.
    """

    __slots__ = ("_context", "_decode", "_keeps", "_known", "_spells_byte", "_window")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        keeps: Callable[[int], bool],
        spells_byte: Callable[[int], bool],
    ) -> None:
        self._decode = decode
        self._keeps = keeps
        self._spells_byte = spells_byte
        self._window: list[int] = []
        self._context = 0  # tokens at the head of the window whose text was returned
        self._known = ""  # their text

    def push(self, ids: Sequence[int]) -> str:
        """See `IncrementalDecoder.push`."""
        self._window.extend(filter(self._keeps, ids))
        if not self._window or self._spells_byte(self._window[-1]):
            return ""
        return self._take()

    def flush(self) -> str:
        """See `IncrementalDecoder.flush`."""
        return self._take()

    def _take(self) -> str:
        text = self._decode(self._window)
        new = text[len(self._known) :]
        recent = self._window[self._context :]
        # The start of a text is special, so a window must begin with tokens that have a text.
        if recent and (known := self._decode(recent)):
            self._window, self._known = recent, known
        else:
            self._known = text
        self._context = len(self._window)
        return new
