"""Draws the next tokens of a whole batch and reports log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .logits import LogitEditor
from .plan import Mask, Seat
from .transfer import upload

__all__ = ["Sampler", "uniform"]

_CANDIDATES = 256
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(
    seeds: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float32]:
    """One number in [0, 1) for each (seed, counter), the same wherever and whenever."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds + _GOLDEN) + counters * _GOLDEN)
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


class Sampler:
    """Holds every slot's settings as columns, so that a step needs no loop over its rows.

    Args:
        slots: `max_running_requests`.
        vocab_size: columns of the logits.
        device: where logits are.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab = vocab_size
        self._device = device
        self._greedy = np.ones(slots, dtype=np.bool_)
        self._heat = np.ones(slots, dtype=np.float32)
        self._top_p = np.ones(slots, dtype=np.float32)
        self._top_k = np.full(slots, vocab_size, dtype=np.int64)
        self._min_p = np.zeros(slots, dtype=np.float32)
        self._seeds = np.zeros(slots, dtype=np.uint64)
        self._prompt = np.zeros(slots, dtype=np.int64)
        self._editor = LogitEditor(slots, vocab_size, device)

    def seat(self, seat: Seat) -> None:
        """Take over a sequence's settings for a slot."""
        slot, sampling = seat.slot, seat.request.sampling
        self._greedy[slot] = sampling.greedy
        self._heat[slot] = sampling.temperature or 1.0
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = self._vocab if sampling.top_k < 1 else min(sampling.top_k, self._vocab)
        self._min_p[slot] = sampling.min_p
        self._seeds[slot] = np.uint64(seat.seed % 2**64)
        self._prompt[slot] = len(seat.request.prompt_ids)
        self._editor.seat(seat)

    def note(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """Tell which tokens a slot's sequence has from position `start` on."""
        self._editor.note(slot, tokens, start)

    def draw(
        self, logits: torch.Tensor, slots: Sequence[int], lengths: Sequence[int], mask: Mask | None
    ) -> torch.Tensor:
        """Draw one token for each row; does not wait for the device where it need not.

        Args:
            logits: (R, vocab), any float type; left as they are.
            slots: of each row.
            lengths: tokens of each row's sequence so far, prompt included.
            mask: restricts some of the rows; its row indices count within these R.

        Returns:
            Token ids, int64 (R,).
        """
        seats = np.asarray(slots, dtype=np.int64)
        made = np.asarray(lengths, dtype=np.int64) - self._prompt[seats]
        if mask is not None or self._editor.concerns(seats, made):
            logits = self._editor.edit(logits, seats, made, mask)
        tokens = logits.argmax(-1)
        drawn = np.flatnonzero(~self._greedy[seats])
        if len(drawn):
            chance = uniform(self._seeds[seats[drawn]], made[drawn].astype(np.uint64))
            rows = self._tensor(drawn)
            part = logits if len(drawn) == len(seats) else logits.index_select(0, rows)
            tokens[rows] = self._random(part.float(), seats[drawn], self._tensor(chance))
        return tokens

    def _random(
        self, logits: torch.Tensor, seats: npt.NDArray[np.int64], chance: torch.Tensor
    ) -> torch.Tensor:
        scaled = logits / self._tensor(self._heat[seats])[:, None]
        filtered = (
            (self._top_p[seats] < 1.0)
            | (self._top_k[seats] < self._vocab)
            | (self._min_p[seats] > 0.0)
        )
        if filtered.all():
            return self._filtered(scaled, seats, chance)
        if not filtered.any():
            return pick(scaled.softmax(-1), chance)
        tokens = torch.empty(len(seats), dtype=torch.int64, device=logits.device)
        some, rest = self._tensor(np.flatnonzero(filtered)), self._tensor(np.flatnonzero(~filtered))
        tokens[some] = self._filtered(scaled[some], seats[filtered], chance[some])
        tokens[rest] = pick(scaled[rest].softmax(-1), chance[rest])
        return tokens

    def _filtered(
        self, scaled: torch.Tensor, seats: npt.NDArray[np.int64], chance: torch.Tensor
    ) -> torch.Tensor:
        """Draw among the best candidates; the rows that need more get the whole vocabulary."""
        limits = self._top_k[seats]
        width = int(limits.max())
        if width > _CANDIDATES:
            width = min(_CANDIDATES, self._vocab)
        tokens, covered = self._among(scaled, seats, chance, width)
        # Looking waits for the device: not where the columns surely are enough.
        if width < int(limits.max()) and not bool(covered.all()):
            rows = (~covered).nonzero()[:, 0]
            picked = rows.cpu().numpy()
            tokens[rows], _ = self._among(scaled[rows], seats[picked], chance[rows], self._vocab)
        return tokens

    def _among(
        self,
        scaled: torch.Tensor,
        seats: npt.NDArray[np.int64],
        chance: torch.Tensor,
        width: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw among each row's `width` best; whether those held all that may be drawn."""
        best, ids = scaled.topk(width, dim=-1)
        limits = self._tensor(self._top_k[seats])[:, None]
        top_p = self._tensor(self._top_p[seats])[:, None]
        keep = torch.arange(width, device=scaled.device) < limits
        within = best.masked_fill(~keep, -torch.inf).logsumexp(-1, keepdim=True)
        total = torch.where(limits <= width, within, scaled.logsumexp(-1, keepdim=True))
        shares = (best - total).exp().masked_fill(~keep, 0.0)
        reached = shares.cumsum(-1)
        # Rounding must not cut the tail where top_p is off.
        keep &= (reached - shares < top_p) | (top_p >= 1.0)
        floor = best[:, :1] + self._tensor(np.log(np.maximum(self._min_p[seats], 1e-30)))[:, None]
        keep &= (best >= floor) | (self._tensor(self._min_p[seats])[:, None] <= 0.0)
        keep[:, 0] = True
        covered = (limits[:, 0] <= width) | ~keep[:, -1]
        choice = pick(shares.masked_fill(~keep, 0.0), chance)
        return ids.gather(1, choice[:, None])[:, 0], covered

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return upload(values, self._device)


def pick(weights: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Invert each row's distribution function at `chance`.

    Args:
        weights: (R, n), not negative, in any scale.
        chance: (R,), in [0, 1).

    Returns:
        Indices (R,), never one of weight zero.
    """
    reached = weights.cumsum(-1)
    total = reached[:, -1]
    target = torch.minimum(chance * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, target[:, None], right=True)[:, 0]
