"""A forward pass on its way: tokens are drawn from its logits, then told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .logprobs import Measured, measure, word
from .plan import Mask, Outcome, Plan
from .request import Request, TokenLogprob
from .sampler import Sampler
from .transfer import Download, upload

__all__ = ["ModelPass"]


class ModelPass:
    """See `Pass`.

    Args:
        plan: what is computed.
        requests: of the plan's rows.
        logits: of the rows that a token is drawn for, then of the positions that are scored.
        sampler: knows the plan's sequences.
    """

    def __init__(
        self, plan: Plan, requests: Sequence[Request], logits: torch.Tensor, sampler: Sampler
    ) -> None:
        self._plan, self._requests = plan, requests
        self._logits, self._sampler = logits, sampler
        self._drawn = [index for index, row in enumerate(plan.rows) if row.sample]
        # Rows that want log-probabilities of what is drawn, those that want the same together.
        self._groups: list[list[int]] = []
        self._download: Download | None = None

    @torch.inference_mode()
    def draw(self, mask: Mask | None = None) -> None:
        """See `Pass`."""
        tokens = self._draw(mask)
        measured = [*self._measure_drawn(tokens), *self._measure_scored()]
        self._download = Download([tokens, *(part for each in measured for part in each)])
        del self._logits

    def outcome(self) -> Outcome:
        """See `Pass`."""
        assert self._download is not None, "draw comes first"
        drawn, *parts = self._download.wait()
        tokens = [-1] * len(self._plan.rows)
        for index, token in zip(self._drawn, drawn.tolist(), strict=True):
            tokens[index] = token
        width = len(Measured._fields)
        measured = (
            Measured(*parts[begin : begin + width]) for begin in range(0, len(parts), width)
        )
        logprobs: dict[int, TokenLogprob] = {}
        for group in self._groups:
            stand = [tokens[index] for index in group]
            logprobs.update(zip(group, self._word(group[0], next(measured), stand), strict=True))
        scores = {
            index: tuple(self._word(index, next(measured), row.targets))
            for index, row in enumerate(self._plan.rows)
            if row.targets
        }
        return Outcome(tokens, logprobs, scores)

    def _draw(self, mask: Mask | None) -> torch.Tensor:
        if not self._drawn:
            return torch.empty(0, dtype=torch.int64)
        rows = [self._plan.rows[index] for index in self._drawn]
        slots = [row.slot for row in rows]
        lengths = [row.start + len(row.tokens) for row in rows]
        logits = self._logits[: len(rows)]
        return self._sampler.draw(logits, slots, lengths, _within(mask, self._drawn))

    def _measure_drawn(self, tokens: torch.Tensor) -> Iterator[Measured]:
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for place, index in enumerate(self._drawn):
            request = self._requests[index]
            if request.return_logprob:
                asked = (request.top_logprobs_num, request.token_ids_logprob)
                groups.setdefault(asked, []).append(place)
        for (top, ids), places in groups.items():
            self._groups.append([self._drawn[place] for place in places])
            rows = upload(np.array(places, dtype=np.int64), tokens.device)
            yield measure(self._logits[rows], tokens[rows], top, ids)

    def _measure_scored(self) -> Iterator[Measured]:
        begin = len(self._drawn)
        for row, request in zip(self._plan.rows, self._requests, strict=True):
            if row.targets:
                part = self._logits[begin : begin + len(row.targets)]
                stand = upload(np.array(row.targets, dtype=np.int64), part.device)
                yield measure(part, stand, request.top_logprobs_num, request.token_ids_logprob)
                begin += len(row.targets)

    def _word(self, index: int, measured: Measured, tokens: Sequence[int]) -> list[TokenLogprob]:
        return word(measured, tokens, self._requests[index].token_ids_logprob)


def _within(mask: Mask | None, drawn: list[int]) -> Mask | None:
    """The mask with row indices counted among the drawn rows."""
    if mask is None:
        return None
    place = {index: number for number, index in enumerate(drawn)}
    return Mask([place[index] for index in mask.rows], mask.bits)
