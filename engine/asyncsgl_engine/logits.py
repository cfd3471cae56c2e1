"""Changes logits before a token is drawn: penalties, biases, tokens that may not come yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from .plan import Row, Seat
from .transfer import upload, upload_all

__all__ = ["LogitEditor"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Place = tuple[torch.Tensor, torch.Tensor]

_FIRST_ROOM = 256  # tokens
_LEAST_REPETITION = 1e-6  # a logit divided by less may be no number any more


class LogitEditor:
    """Each slot's penalties, biases and forbidden tokens.

    All of them concern few of a row's logits: those of tokens seen before, or named in the
    request. So only these are read and written, whatever the size of the vocabulary.

    Args:
        slots: `max_running_requests`.
        vocab_size: columns of the logits.
        device: where logits are.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._seen = _Seen(slots, vocab_size, device)
        self._penalised = np.zeros(slots, dtype=np.bool_)
        self._frequency = np.zeros(slots, dtype=np.float32)
        self._presence = np.zeros(slots, dtype=np.float32)
        self._repetition = np.ones(slots, dtype=np.float32)
        self._least = np.zeros(slots, dtype=np.int64)
        self._biased = np.zeros(slots, dtype=np.bool_)
        self._biases = _Additions(device)
        self._bans = _Additions(device)

    def seat(self, seat: Seat) -> None:
        """Take over a sequence's settings and tokens for a slot."""
        slot, sampling = seat.slot, seat.request.sampling
        self._penalised[slot] = sampling.penalised
        self._frequency[slot] = sampling.frequency_penalty
        self._presence[slot] = sampling.presence_penalty
        self._repetition[slot] = max(sampling.repetition_penalty, _LEAST_REPETITION)
        self._least[slot] = sampling.min_new_tokens
        self._biased[slot] = bool(sampling.logit_bias)
        if sampling.min_new_tokens:
            stops = np.array(seat.stop_ids, dtype=np.int64)
            self._bans.set(slot, stops, np.full(len(stops), -np.inf, dtype=np.float32))
        if sampling.logit_bias:
            self._biases.set(slot, *_sums(sampling.logit_bias))
        if sampling.penalised:
            prompt = len(seat.request.prompt_ids)
            self._seen.restart(slot, seat.tokens[:prompt])
            self._seen.add(slot, seat.tokens[prompt:], prompt)

    def note(self, rows: Sequence[Row]) -> None:
        """Count the tokens of these rows that were not counted yet."""
        if not self._penalised.any():
            return
        slots = np.fromiter((row.slot for row in rows), np.int64, len(rows))
        ends = np.fromiter((row.start + len(row.tokens) for row in rows), np.int64, len(rows))
        behind = self._penalised[slots] & (self._seen.counted[slots] < ends)
        # Only tokens that were not drawn here: a prompt's are counted when it is seated.
        for row in np.flatnonzero(behind).tolist():
            self._seen.add(rows[row].slot, rows[row].tokens, rows[row].start)

    def take(self, seats: Ints, lengths: Ints, tokens: torch.Tensor) -> None:
        """Count tokens that were just drawn, without waiting for the device.

        Args:
            seats: slots they were drawn for.
            lengths: tokens of each one's sequence before.
            tokens: (R,), on the device.
        """
        rows = np.flatnonzero(self._penalised[seats])
        if len(rows):
            self._seen.take(seats[rows], lengths[rows], tokens[upload(rows, self._device)])

    def concerns(self, seats: Ints, made: Ints) -> bool:
        """Whether any of these rows needs its logits changed.

        Args:
            seats: slot of each row.
            made: output tokens of each row so far.
        """
        return bool(
            self._penalised[seats].any()
            or self._biased[seats].any()
            or (made < self._least[seats]).any()
        )

    @contextmanager
    def edited(self, logits: torch.Tensor, seats: Ints, made: Ints) -> Iterator[torch.Tensor]:
        """Changed logits, as float32, for as long as the block lasts.

        Args:
            logits: (R, vocab), any float type; float32 ones are changed where they lie, and put
                back in the end.
            seats: slot of each row.
            made: output tokens of each row so far.
        """
        logits = logits.float()
        undo: list[tuple[Place, torch.Tensor]] = []
        try:
            penalised = np.flatnonzero(self._penalised[seats])
            if len(penalised):
                undo.append(self._penalise(logits, penalised, seats[penalised]))
            for concerned, additions in (
                (self._biased[seats], self._biases),
                (made < self._least[seats], self._bans),
            ):
                rows = np.flatnonzero(concerned)
                if len(rows):
                    place, values = additions.of(rows, seats[rows])
                    before = logits[place]
                    undo.append((place, before))
                    logits[place] = before + values
            yield logits
        finally:
            for place, before in reversed(undo):
                logits[place] = before

    def _penalise(
        self, logits: torch.Tensor, rows: Ints, slots: Ints
    ) -> tuple[Place, torch.Tensor]:
        settings = (self._frequency[slots], self._presence[slots], self._repetition[slots])
        sent = upload_all([rows, slots, *settings], self._device)
        lines, where, frequency, presence, repetition = (column[:, None] for column in sent)
        ids, counts = self._seen.of(where, int(self._seen.filled[slots].max()))
        before = logits[lines, ids]
        changed = torch.where(before < 0, before * repetition, before / repetition)
        changed -= counts * frequency
        changed -= (counts > 0) * presence
        logits[lines, ids] = changed
        return (lines, ids), before


class _Seen:
    """Which tokens each slot's sequence has, and how often each is in its output.

    A line lists the tokens in any order, some of them several times; places that are not filled
    repeat the first. Who changes the logits of all that are listed changes each in the same way.

    Attributes:
        filled: places in use, of each slot.
        counted: tokens of the sequence that are counted, of each slot.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._slots, self._vocab, self._device = slots, vocab_size, device
        self.filled = np.zeros(slots, dtype=np.int64)
        self.counted = np.zeros(slots, dtype=np.int64)
        # Made when the first penalty is asked for: [slots, room] and [slots, vocab].
        self._ids = torch.empty((slots, 0), dtype=torch.int64, device=device)
        self._counts = torch.empty(0, device=device)

    def restart(self, slot: int, prompt: Sequence[int]) -> None:
        """Forget a slot's tokens, and take a prompt's, at least one."""
        if not len(self._counts):
            self._counts = torch.zeros((self._slots, self._vocab), device=self._device)
        self._counts[slot].zero_()
        ids = np.unique(np.array(prompt, dtype=np.int64))
        self._make_room(len(ids))
        self._ids[slot].fill_(int(ids[0]))
        self._ids[slot, : len(ids)] = upload(ids, self._device)
        self.filled[slot], self.counted[slot] = len(ids), len(prompt)

    def add(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """Count those of a slot's output tokens from position `start` on that are new."""
        new = tokens[max(int(self.counted[slot]) - start, 0) :]
        if not new:
            return
        begin, end = int(self.filled[slot]), int(self.filled[slot]) + len(new)
        self._make_room(end)
        ids = upload(np.array(new, dtype=np.int64), self._device)
        self._ids[slot, begin:end] = ids
        self._counts[slot].index_add_(0, ids, torch.ones(len(new), device=self._device))
        self.filled[slot], self.counted[slot] = end, start + len(tokens)

    def take(self, slots: Ints, lengths: Ints, tokens: torch.Tensor) -> None:
        """Count a token for each of these slots, whose sequences had so many before."""
        places = self.filled[slots]
        self._make_room(int(places.max()) + 1)
        lines, columns = upload_all([slots, places], self._device)
        self._ids[lines, columns] = tokens
        self._counts[lines, tokens] += 1.0
        self.filled[slots] += 1
        self.counted[slots] = lengths + 1

    def of(self, slots: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of some slots, and how often each is in the output.

        Args:
            slots: (n, 1).
            width: the most places that any of them has filled.
        """
        ids = self._ids[slots[:, 0], :width]
        return ids, self._counts[slots, ids]

    def _make_room(self, width: int) -> None:
        room = self._ids.shape[1]
        if width > room:
            wider = max(width, 2 * room, _FIRST_ROOM)
            ids = self._ids.new_zeros((self._slots, wider))
            if room:
                ids[:, :room] = self._ids
                ids[:, room:] = self._ids[:, :1]
            self._ids = ids


class _Additions:
    """What is added to single logits of each slot; sent to the device when the rows change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[int, tuple[Ints, Floats]] = {}
        self._sent: tuple[tuple[list[int], list[int]], tuple[Place, torch.Tensor]] | None = None

    def set(self, slot: int, ids: Ints, values: Floats) -> None:
        """Replace a slot's; no token twice."""
        self._values[slot] = ids, values
        self._sent = None

    def of(self, rows: Ints, slots: Ints) -> tuple[Place, torch.Tensor]:
        """Where in the logits, and how much, for rows of these slots."""
        wanted = rows.tolist(), slots.tolist()
        if self._sent is None or self._sent[0] != wanted:
            parts = [self._values[slot] for slot in wanted[1]]
            lines = np.repeat(rows, [len(ids) for ids, _ in parts])
            ids = np.concatenate([ids for ids, _ in parts])
            values = np.concatenate([values for _, values in parts])
            at, column, added = upload_all([lines, ids, values], self._device)
            self._sent = wanted, ((at, column), added)
        return self._sent[1]


def _sums(pairs: Sequence[tuple[int, float]]) -> tuple[Ints, Floats]:
    """Each token once, with the sum of its biases."""
    tokens = np.array([token for token, _ in pairs], dtype=np.int64)
    ids, places = np.unique(tokens, return_inverse=True)
    values = np.zeros(len(ids), dtype=np.float32)
    np.add.at(values, places, np.array([bias for _, bias in pairs], dtype=np.float32))
    return ids, values
