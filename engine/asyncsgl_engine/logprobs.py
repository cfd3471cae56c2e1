"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .request import TokenLogprob
from .transfer import upload

__all__ = ["describe"]

_ROWS_AT_ONCE = 64


def describe(
    logits: torch.Tensor, tokens: Sequence[int], top: int, ids: Sequence[int]
) -> list[TokenLogprob]:
    """Report on one position after another.

    Args:
        logits: (R, vocab), as the model gave them.
        tokens: the token that stands at each position.
        top: how many of the most probable tokens to list.
        ids: tokens to list besides.
    """
    found: list[TokenLogprob] = []
    for begin in range(0, len(tokens), _ROWS_AT_ONCE):
        some = tokens[begin : begin + _ROWS_AT_ONCE]
        found += _describe(logits[begin : begin + len(some)].float(), some, top, ids)
    return found


def _describe(
    logits: torch.Tensor, tokens: Sequence[int], top: int, ids: Sequence[int]
) -> list[TokenLogprob]:
    total = logits.logsumexp(-1, keepdim=True)
    stands = upload(np.array(tokens, dtype=np.int64), logits.device)[:, None]
    own: list[list[float]] = (logits.gather(1, stands) - total).tolist()
    best_ids: list[list[int]] = [[] for _ in tokens]
    best: list[list[float]] = best_ids  # type: ignore[assignment]
    if top:
        values, places = logits.topk(min(top, logits.shape[1]), dim=-1)
        best_ids, best = places.tolist(), (values - total).tolist()
    chosen: list[list[float]] = [[] for _ in tokens]
    if ids:
        columns = upload(np.array(ids, dtype=np.int64), logits.device)
        chosen = (logits[:, columns] - total).tolist()
    return [
        TokenLogprob(
            token,
            own[row][0],
            tuple(zip(best_ids[row], best[row], strict=True)),
            tuple(zip(ids, chosen[row], strict=True)),
        )
        for row, token in enumerate(tokens)
    ]
