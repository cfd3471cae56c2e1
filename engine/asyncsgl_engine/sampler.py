"""Draws the next tokens of a whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .drawing import NO_TOKEN, Drawer, Draws, TorchDrawer
from .logits import LogitEditor
from .plan import Mask, Row, Seat
from .transfer import upload

__all__ = ["NO_TOKEN", "Sampler", "uniform"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LEAST_HEAT = 1e-30  # logits divided by less would overflow


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
        drawer: draws from logits; with PyTorch's operators by default.
    """

    def __init__(
        self, slots: int, vocab_size: int, device: torch.device, drawer: Drawer | None = None
    ) -> None:
        self._vocab = vocab_size
        self._drawer = drawer if drawer is not None else TorchDrawer(vocab_size, device)
        self._heat = np.zeros(slots, dtype=np.float32)
        self._top_p = np.ones(slots, dtype=np.float32)
        self._top_k = np.full(slots, vocab_size, dtype=np.int64)
        self._min_p = np.zeros(slots, dtype=np.float32)
        self._seeds = np.zeros(slots, dtype=np.uint64)
        self._prompt = np.zeros(slots, dtype=np.int64)
        self._editor = LogitEditor(slots, vocab_size, device)
        self._device = device
        self.drawn = torch.zeros(slots, dtype=torch.int64, device=device)
        """The token last drawn in each slot."""

    def seat(self, seat: Seat) -> None:
        """Take over a sequence's settings for a slot."""
        slot, sampling = seat.slot, seat.request.sampling
        self._heat[slot] = 0.0 if sampling.greedy else max(sampling.temperature, _LEAST_HEAT)
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = self._vocab if sampling.top_k < 1 else min(sampling.top_k, self._vocab)
        self._min_p[slot] = sampling.min_p
        self._seeds[slot] = np.uint64(seat.seed % 2**64)
        self._prompt[slot] = len(seat.request.prompt_ids)
        self._editor.seat(seat)

    def note(self, rows: Sequence[Row]) -> None:
        """Take note of the tokens that a step computes: some may not have been drawn here."""
        self._editor.note(rows)

    def draw(
        self, logits: torch.Tensor, slots: Sequence[int], lengths: Sequence[int], mask: Mask | None
    ) -> torch.Tensor:
        """Draw one token for each row; does not wait for the device where it need not.

        Args:
            logits: (R, vocab), any float type; in the end as they were.
            slots: of each row.
            lengths: tokens of each row's sequence so far, prompt included.
            mask: restricts some of the rows; its row indices count within these R.

        Returns:
            Tokens, int64 (R,), where the logits are; `NO_TOKEN` where those are no finite
            numbers or allow nothing.
        """
        seats = np.asarray(slots, dtype=np.int64)
        made = np.asarray(lengths, dtype=np.int64) - self._prompt[seats]
        heat = self._heat[seats]
        chance = np.zeros(len(seats), dtype=np.float32)
        if heat.any():
            chance = uniform(self._seeds[seats], made.astype(np.uint64))
        draws = Draws(heat, self._top_p[seats], self._top_k[seats], self._min_p[seats], chance)
        if not self._editor.concerns(seats, made):
            return self._drawer.draw(logits, draws, mask)
        with self._editor.edited(logits, seats, made) as edited:
            return self._drawer.draw(edited, draws, mask)

    def take(self, slots: Sequence[int], lengths: Sequence[int], tokens: torch.Tensor) -> None:
        """Take note of what `draw` gave, where that becomes part of the sequences."""
        seats, tokens = np.asarray(slots, dtype=np.int64), tokens.clamp_min(0)
        self.drawn.index_copy_(0, upload(seats, self._device), tokens)
        self._editor.take(seats, np.asarray(lengths, dtype=np.int64), tokens)
