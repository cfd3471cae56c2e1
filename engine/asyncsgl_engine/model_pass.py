"""A forward pass on its way: tokens are drawn from its logits, then told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch

from .logprobs import LogprobReporter, Report
from .plan import Mask, Outcome, Plan
from .request import TokenLogprob
from .sampler import NO_TOKEN, Sampler
from .transfer import Download, upload

__all__ = ["ModelPass"]


class ModelPass:
    """See `Pass`.

    Args:
        plan: what is computed.
        logits: of the rows that a token is drawn for, then of the positions that are scored.
        sampler: knows the plan's sequences.
        reporter: knows what they want to be told.
    """

    def __init__(
        self, plan: Plan, logits: torch.Tensor, sampler: Sampler, reporter: LogprobReporter
    ) -> None:
        self._plan, self._logits = plan, logits
        self._sampler, self._reporter = sampler, reporter
        self._drawn = [index for index, row in enumerate(plan.rows) if row.sample]
        self._slots = [plan.rows[index].slot for index in self._drawn]
        self._scored = [(index, row) for index, row in enumerate(plan.rows) if row.targets]
        self._wanted = reporter.wanted(self._slots)
        self._report: Report | None = None
        self._download: Download | None = None

    @torch.inference_mode()
    def draw(self, mask: Mask | None, forced: Mapping[int, int]) -> None:
        """See `Pass`."""
        tokens = self._draw(mask, forced)
        self._report = self._describe(tokens, forced)
        described = self._report.tensors if self._report is not None else ()
        self._download = Download([tokens, *described])
        del self._logits

    def outcome(self) -> Outcome:
        """See `Pass`."""
        assert self._download is not None, "draw comes first"
        drawn, *described = self._download.wait()
        tokens = [-1] * len(self._plan.rows)
        for index, token in zip(self._drawn, drawn.tolist(), strict=True):
            tokens[index] = token
        faulty = {index for index in self._drawn if tokens[index] == NO_TOKEN}
        if self._report is None:
            return Outcome(tokens, faulty=frozenset(faulty))
        entries = iter(self._report.entries(described))
        logprobs = {self._drawn[place]: next(entries) for place in self._wanted.tolist()}
        scores = {index: tuple(islice(entries, len(row.targets))) for index, row in self._scored}
        faulty |= {index for index, some in scores.items() if _unsound(some)}
        return Outcome(tokens, logprobs, scores, frozenset(faulty))

    def _draw(self, mask: Mask | None, forced: Mapping[int, int]) -> torch.Tensor:
        if not self._drawn:
            return torch.empty(0, dtype=torch.int64, device=self._logits.device)
        rows = [self._plan.rows[index] for index in self._drawn]
        lengths = [row.start + len(row.tokens) for row in rows]
        logits = self._logits[: len(rows)]
        tokens = self._sampler.draw(logits, self._slots, lengths, _within(mask, self._drawn))
        if not forced:
            self._sampler.take(self._slots, lengths, tokens)
            return tokens
        kept = [place for place, index in enumerate(self._drawn) if index not in forced]
        if kept:
            where = upload(np.array(kept, dtype=np.int64), tokens.device)
            slots = [self._slots[place] for place in kept]
            self._sampler.take(slots, [lengths[place] for place in kept], tokens[where])
        return tokens

    def _describe(self, tokens: torch.Tensor, forced: Mapping[int, int]) -> Report | None:
        """Of the rows that want it what follows them, then all positions that are scored."""
        if not (len(self._wanted) or self._scored):
            return None
        targets = [token for _, row in self._scored for token in row.targets]
        rows = np.append(self._wanted, len(self._drawn) + np.arange(len(targets)))
        slots = [self._slots[place] for place in self._wanted.tolist()]
        slots += [row.slot for _, row in self._scored for _ in row.targets]
        device = tokens.device
        following = tokens.clamp_min(0)
        if forced:
            known = [forced.get(index, NO_TOKEN) for index in self._drawn]
            others = upload(np.array(known, dtype=np.int64), device)
            following = torch.where(others == NO_TOKEN, following, others)
        following = following[upload(self._wanted, device)]
        stand = torch.cat((following, upload(np.array(targets, dtype=np.int64), device)))
        return self._reporter.report(self._logits, rows, slots, stand)


def _unsound(entries: Sequence[TokenLogprob]) -> bool:
    return any(entry.logprob is not None and math.isnan(entry.logprob) for entry in entries)


def _within(mask: Mask | None, drawn: list[int]) -> Mask | None:
    """The mask with row indices counted among the drawn rows."""
    if mask is None:
        return None
    place = {index: number for number, index in enumerate(drawn)}
    return Mask([place[index] for index in mask.rows], mask.bits)
