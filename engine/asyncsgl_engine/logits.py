"""Changes logits before a token is drawn: penalties, biases, forbidden tokens, grammars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from .plan import Mask, Seat
from .transfer import upload

__all__ = ["LogitEditor", "refused_tokens"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class LogitEditor:
    """Each slot's token counts and biases.

    Args:
        slots: `max_running_requests`.
        vocab_size: columns of the logits.
        device: where logits are.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._slots, self._vocab, self._device = slots, vocab_size, device
        self._penalised = np.zeros(slots, dtype=np.bool_)
        self._frequency = np.zeros(slots, dtype=np.float32)
        self._presence = np.zeros(slots, dtype=np.float32)
        self._repetition = np.ones(slots, dtype=np.float32)
        self._least = np.zeros(slots, dtype=np.int64)
        self._biased = np.zeros(slots, dtype=np.bool_)
        self._noted = np.zeros(slots, dtype=np.int64)
        self._biases: dict[int, tuple[Ints, Floats]] = {}
        self._stops: dict[int, Ints] = {}
        # Made when the first penalty is asked for: [slots, vocab] each.
        self._seen: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    def seat(self, seat: Seat) -> None:
        """Take over a sequence's settings and tokens for a slot."""
        slot, sampling = seat.slot, seat.request.sampling
        self._penalised[slot] = sampling.penalised
        self._frequency[slot] = sampling.frequency_penalty
        self._presence[slot] = sampling.presence_penalty
        self._repetition[slot] = sampling.repetition_penalty
        self._least[slot] = sampling.min_new_tokens
        self._stops[slot] = np.array(seat.stop_ids, dtype=np.int64)
        self._biased[slot] = bool(sampling.logit_bias)
        self._biases[slot] = (
            np.array([token for token, _ in sampling.logit_bias], dtype=np.int64),
            np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32),
        )
        if sampling.penalised:
            prompt = len(seat.request.prompt_ids)
            seen, counts = self._tables()
            seen[slot].zero_()
            counts[slot].zero_()
            seen[slot, self._tensor(np.array(seat.tokens[:prompt], dtype=np.int64))] = True
            self._noted[slot] = prompt
            self.note(slot, seat.tokens[prompt:], prompt)

    def note(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """Count tokens of a slot's output that were not counted yet."""
        if not self._penalised[slot]:
            return
        new = tokens[max(int(self._noted[slot]) - start, 0) :]
        if not new:
            return
        self._noted[slot] = start + len(tokens)
        seen, counts = self._tables()
        ids = self._tensor(np.array(new, dtype=np.int64))
        seen[slot, ids] = True
        counts[slot].index_add_(0, ids, torch.ones(len(new), device=self._device))

    def concerns(self, seats: Ints, made: Ints) -> bool:
        """Whether any of these rows needs its logits changed."""
        return bool(
            self._penalised[seats].any()
            or self._biased[seats].any()
            or (made < self._least[seats]).any()
        )

    def edit(
        self, logits: torch.Tensor, seats: Ints, made: Ints, mask: Mask | None
    ) -> torch.Tensor:
        """Give changed logits as float32; see `Sampler.draw` for the arguments.

        Args:
            made: output tokens of each row so far.
        """
        logits = logits.to(torch.float32, copy=True)
        self._penalise(logits, seats)
        biased = np.flatnonzero(self._biased[seats])
        if len(biased):
            self._add_sparse(logits, biased, {int(row): self._biases[seats[row]] for row in biased})
        early = np.flatnonzero(made < self._least[seats])
        if len(early):
            banned = {int(row): self._ban(int(seats[row])) for row in early}
            self._add_sparse(logits, early, banned)
        if mask is not None:
            self._restrict(logits, mask)
        return logits

    def _ban(self, slot: int) -> tuple[Ints, Floats]:
        stops = self._stops[slot]
        return stops, np.full(len(stops), -np.inf, dtype=np.float32)

    def _penalise(self, logits: torch.Tensor, seats: Ints) -> None:
        rows = np.flatnonzero(self._penalised[seats])
        if not len(rows):
            return
        slots = seats[rows]
        seen_table, count_table = self._tables()
        index, where = self._tensor(rows), self._tensor(slots)
        part, counts = logits[index], count_table[where]
        repetition = self._column(self._repetition[slots])
        harder = torch.where(part < 0, part * repetition, part / repetition)
        part = torch.where(seen_table[where], harder, part)
        part -= counts * self._column(self._frequency[slots])
        part -= (counts > 0) * self._column(self._presence[slots])
        logits[index] = part

    def _add_sparse(
        self, logits: torch.Tensor, rows: Ints, values: Mapping[int, tuple[Ints, Floats]]
    ) -> None:
        ids = np.concatenate([values[int(row)][0] for row in rows])
        added = np.concatenate([values[int(row)][1] for row in rows])
        lines = np.repeat(rows, [len(values[int(row)][0]) for row in rows])
        place = (self._tensor(lines), self._tensor(ids))
        logits.index_put_(place, self._tensor(added), accumulate=True)

    def _restrict(self, logits: torch.Tensor, mask: Mask) -> None:
        refused = self._refused(mask)[:, : self._vocab]
        columns = refused.shape[1]
        index = self._tensor(np.array(mask.rows, dtype=np.int64))
        part = logits[index]
        part[:, :columns].masked_fill_(refused, -torch.inf)
        part[:, columns:] = -torch.inf
        logits[index] = part

    def _refused(self, mask: Mask) -> torch.Tensor:
        if self._device.type != "cpu":
            return refused_tokens(self._tensor(mask.bits))
        allowed = np.unpackbits(mask.bits.view(np.uint8), axis=1, bitorder="little")
        return torch.from_numpy(allowed) == 0

    def _column(self, values: Floats) -> torch.Tensor:
        return self._tensor(values)[:, None]

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return upload(values, self._device)

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._seen is None or self._counts is None:
            shape = (self._slots, self._vocab)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._counts = torch.zeros(shape, dtype=torch.float32, device=self._device)
        return self._seen, self._counts


def refused_tokens(bits: torch.Tensor) -> torch.Tensor:
    """Unpack a mask where it lies: a thirty-second of the bytes goes to the device.

    Args:
        bits: (rows, words), int32, as `Mask.bits`.

    Returns:
        (rows, 32 * words), True where a token is not allowed.
    """
    places = torch.arange(32, dtype=bits.dtype, device=bits.device)
    return ((bits[:, :, None] >> places) & 1 == 0).flatten(1)
