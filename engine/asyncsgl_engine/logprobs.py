"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from .request import Request, TokenLogprob
from .transfer import upload, upload_all

__all__ = ["Describer", "LogprobReporter", "Report", "TorchDescriber"]

_ROWS_AT_ONCE = 64

Ints = npt.NDArray[np.int64]
Listed = tuple[tuple[int, float], ...]


class Describer(Protocol):
    """Computes what log-probabilities are made of."""

    def describe(
        self, logits: torch.Tensor, rows: Ints, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look at the distributions of P positions.

        Args:
            logits: (R, vocab), any float type.
            rows: of the logits, of each position.
            top: how many of the best tokens are wanted, at most the vocabulary.

        Returns:
            The logarithm of each one's sum of exponentials, (P,), and its best tokens, best
            first, int64 (P, top).
        """
        ...


class TorchDescriber:
    """For every device and type."""

    def describe(
        self, logits: torch.Tensor, rows: Ints, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Describer`."""
        totals, best = [], []
        for index in torch.split(upload(rows, logits.device), _ROWS_AT_ONCE):
            part = logits.index_select(0, index).float()
            totals.append(part.logsumexp(-1))
            best.append(part.topk(top, dim=-1).indices)
        return torch.cat(totals), torch.cat(best)


@dataclass(frozen=True, slots=True)
class Report:
    """Log-probabilities of P positions, where they were computed.

    Args:
        tops: how many of the best tokens each position lists; (P,).
        named: the tokens that each position lists besides.
        tensors: what `entries` needs: the token that stands at each position and its
            log-probability, (P,) each; the best tokens and theirs, (P, most of `tops`) each; and
            those of the named tokens, one position's after the other's.
    """

    tops: Sequence[int]
    named: Sequence[Sequence[int]]
    tensors: tuple[torch.Tensor, ...]

    def entries(self, tensors: Sequence[torch.Tensor]) -> list[TokenLogprob]:
        """One for each position.

        Args:
            tensors: this report's, on the CPU.
        """
        tokens, own, best, of_best, of_named = (tensor.tolist() for tensor in tensors)
        tops: list[Listed] = [()] * len(tokens)
        if any(self.tops):
            lines = zip(best, of_best, self.tops, strict=True)
            tops = [tuple(zip(ids[:top], values, strict=False)) for ids, values, top in lines]
        named: list[Listed] = [()] * len(tokens)
        if of_named:
            values = iter(of_named)
            # The ids end first, so that no value is lost to the next position.
            named = [tuple(zip(ids, values, strict=False)) for ids in self.named]
        return list(map(TokenLogprob, tokens, own, tops, named))


class LogprobReporter:
    """Knows what each slot's request wants to know.

    Args:
        slots: `max_running_requests`.
        vocab_size: columns of the logits.
        describer: computes; with PyTorch's operators by default.
    """

    def __init__(self, slots: int, vocab_size: int, describer: Describer | None = None) -> None:
        self._vocab = vocab_size
        self._describer = describer if describer is not None else TorchDescriber()
        self._wanted = np.zeros(slots, dtype=np.bool_)
        self._top = np.zeros(slots, dtype=np.int64)
        self._named: list[tuple[int, ...]] = [()] * slots

    def seat(self, slot: int, request: Request) -> None:
        """Take over what a request wants."""
        self._wanted[slot] = request.return_logprob
        self._top[slot] = min(request.top_logprobs_num, self._vocab)
        self._named[slot] = request.token_ids_logprob

    def wanted(self, slots: Sequence[int]) -> Ints:
        """Which of these rows want their drawn tokens described."""
        return np.flatnonzero(self._wanted[np.asarray(slots, dtype=np.int64)])

    def report(
        self, logits: torch.Tensor, rows: Ints, slots: Sequence[int], tokens: torch.Tensor
    ) -> Report:
        """Describe the tokens of P positions, without waiting for the device.

        Args:
            logits: (R, vocab), as the model gave them.
            rows: of the logits, of each position.
            slots: whose position each is.
            tokens: that stands at each; int64, where the logits are.
        """
        tops = self._top[np.asarray(slots, dtype=np.int64)]
        named = [self._named[slot] for slot in slots]
        counts = np.fromiter(map(len, named), np.int64, len(named))
        ids = np.fromiter((token for some in named for token in some), np.int64, counts.sum())
        lines = np.repeat(np.arange(len(rows)), counts)
        index, at, columns = upload_all([rows, lines, ids], logits.device)
        totals, best = self._describer.describe(logits, rows, int(tops.max(initial=0)))
        own = logits[index, tokens] - totals
        of_best = logits[index[:, None], best] - totals[:, None]
        of_named = logits[index[at], columns] - totals[at]
        parts = (own.float(), best, of_best.float(), of_named.float())
        return Report(tops.tolist(), named, (tokens, *parts))
