"""Draws tokens from logits: what a draw is told, and how PyTorch's operators do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from .plan import Mask
from .transfer import upload

__all__ = ["NO_TOKEN", "Drawer", "Draws", "TorchDrawer", "pick", "refused_tokens"]

NO_TOKEN = -1
_CANDIDATES = 256

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Draws:
    """Settings of a step's rows, as columns; each (R,).

    Args:
        heat: temperature; 0 takes the most probable token.
        top_p: share of the probability that is kept; 1 keeps all.
        top_k: tokens that are kept, at most the vocabulary.
        min_p: share of the best token's probability that a token must have.
        chance: where to invert the distribution function, in [0, 1).
    """

    heat: Floats
    top_p: Floats
    top_k: Ints
    min_p: Floats
    chance: Floats

    def of(self, rows: Ints) -> Draws:
        """Some of the rows."""
        return Draws(
            self.heat[rows],
            self.top_p[rows],
            self.top_k[rows],
            self.min_p[rows],
            self.chance[rows],
        )


class Drawer(Protocol):
    """Draws a token for each row; a row's token depends on nothing but that row."""

    def draw(self, logits: torch.Tensor, draws: Draws, mask: Mask | None) -> torch.Tensor:
        """Draw.

        Args:
            logits: (R, vocab), any float type; left as they are.
            draws: settings of the R rows.
            mask: restricts some of them.

        Returns:
            Tokens, int64 (R,), where the logits are; `NO_TOKEN` where those are no finite
            numbers, or none of them is allowed.
        """
        ...


class TorchDrawer:
    """For every device and type.

    Args:
        vocab_size: columns of the logits.
        device: where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab, self._device = vocab_size, device

    def draw(self, logits: torch.Tensor, draws: Draws, mask: Mask | None) -> torch.Tensor:
        """See `Drawer`."""
        if mask is None:
            return self._draw(logits, draws)
        restricted = np.array(mask.rows, dtype=np.int64)
        tokens = torch.empty(len(draws.heat), dtype=torch.int64, device=self._device)
        index = self._tensor(restricted)
        part = logits.index_select(0, index)
        self._restrict(part, mask)
        tokens[index] = self._draw(part, draws.of(restricted))
        free = np.setdiff1d(np.arange(len(tokens)), restricted)
        if len(free):
            index = self._tensor(free)
            tokens[index] = self._draw(logits.index_select(0, index), draws.of(free))
        return tokens

    def _restrict(self, part: torch.Tensor, mask: Mask) -> None:
        """Forbid tokens, in place; `part` has the mask's rows only."""
        refused = refused_tokens(self._tensor(mask.bits))[:, : self._vocab]
        columns = refused.shape[1]
        part[:, :columns].masked_fill_(refused, -torch.inf)
        part[:, columns:] = -torch.inf

    def _draw(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        best, tokens = logits.max(-1)
        drawn = np.flatnonzero(draws.heat)
        if len(drawn) == len(draws.heat):
            tokens = self._random(logits, draws)
        elif len(drawn):
            rows = self._tensor(drawn)
            tokens[rows] = self._random(logits.index_select(0, rows), draws.of(drawn))
        # The greatest of numbers that are not all numbers is none.
        return tokens.masked_fill_(~best.isfinite(), NO_TOKEN)

    def _random(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        scaled = logits.float() / self._tensor(draws.heat)[:, None]
        filtered = (draws.top_p < 1.0) | (draws.top_k < self._vocab) | (draws.min_p > 0.0)
        if filtered.all():
            return self._filtered(scaled, draws)
        if not filtered.any():
            return pick(scaled.softmax(-1), self._tensor(draws.chance))
        tokens = torch.empty(len(filtered), dtype=torch.int64, device=self._device)
        some, rest = np.flatnonzero(filtered), np.flatnonzero(~filtered)
        where = self._tensor(some)
        tokens[where] = self._filtered(scaled[where], draws.of(some))
        where = self._tensor(rest)
        tokens[where] = pick(scaled[where].softmax(-1), self._tensor(draws.chance[rest]))
        return tokens

    def _filtered(self, scaled: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Draw among the best candidates; the rows that need more get the whole vocabulary."""
        width = int(draws.top_k.max())
        if width > _CANDIDATES:
            width = min(_CANDIDATES, self._vocab)
        tokens, covered = self._among(scaled, draws, width)
        # Looking waits for the device: not where the columns surely are enough.
        if width < int(draws.top_k.max()) and not bool(covered.all()):
            rows = (~covered).nonzero()[:, 0]
            tokens[rows], _ = self._among(scaled[rows], draws.of(rows.cpu().numpy()), self._vocab)
        return tokens

    def _among(
        self, scaled: torch.Tensor, draws: Draws, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw among each row's `width` best; whether those held all that may be drawn."""
        best, ids = scaled.topk(width, dim=-1)
        limits = self._tensor(draws.top_k)[:, None]
        top_p = self._tensor(draws.top_p)[:, None]
        keep = torch.arange(width, device=scaled.device) < limits
        within = best.masked_fill(~keep, -torch.inf).logsumexp(-1, keepdim=True)
        total = torch.where(limits <= width, within, scaled.logsumexp(-1, keepdim=True))
        shares = (best - total).exp().masked_fill(~keep, 0.0)
        reached = shares.cumsum(-1)
        # Rounding must not cut the tail where top_p is off.
        keep &= (reached - shares < top_p) | (top_p >= 1.0)
        floor = best[:, :1] + self._tensor(np.log(np.maximum(draws.min_p, 1e-30)))[:, None]
        keep &= (best >= floor) | (self._tensor(draws.min_p)[:, None] <= 0.0)
        keep[:, 0] = True
        # Of a top_k that is wider, the total that top_p is a share of is not known here.
        known = (limits >= self._vocab) | (top_p >= 1.0)
        covered = (limits[:, 0] <= width) | (known[:, 0] & ~keep[:, -1])
        choice = pick(shares.masked_fill(~keep, 0.0), self._tensor(draws.chance))
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
    found = torch.searchsorted(reached, target[:, None], right=True)[:, 0]
    return found.clamp_max(weights.shape[1] - 1)  # past the end where weights are not numbers


def refused_tokens(bits: torch.Tensor) -> torch.Tensor:
    """Unpack a mask where it lies: a thirty-second of the bytes goes to the device.

    Args:
        bits: (rows, words), int32, as `Mask.bits`.

    Returns:
        (rows, 32 * words), True where a token is not allowed.
    """
    if bits.device.type == "cpu":
        allowed = np.unpackbits(bits.numpy().view(np.uint8), axis=1, bitorder="little")
        return torch.from_numpy(allowed).view(torch.bool).logical_not_()
    places = torch.arange(32, dtype=bits.dtype, device=bits.device)
    return ((bits[:, :, None] >> places) & 1 == 0).flatten(1)
