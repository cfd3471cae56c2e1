"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .request import TokenLogprob
from .transfer import upload

__all__ = ["Measured", "measure", "word"]

_ROWS_AT_ONCE = 64


class Measured(NamedTuple):
    """What is reported of R positions, where it was computed.

    Args:
        own: of the token that stands there, (R,).
        best_ids: the most probable tokens, (R, top).
        best: theirs.
        chosen: of the tokens asked for, (R, ids).
    """

    own: torch.Tensor
    best_ids: torch.Tensor
    best: torch.Tensor
    chosen: torch.Tensor


def measure(logits: torch.Tensor, tokens: torch.Tensor, top: int, ids: Sequence[int]) -> Measured:
    """Compute log-probabilities, without waiting for the device.

    Args:
        logits: (R, vocab), as the model gave them.
        tokens: the token that stands at each position, int64 (R,), on the same device.
        top: how many of the most probable tokens to list.
        ids: tokens to list besides.
    """
    columns = upload(np.array(ids, dtype=np.int64), logits.device)
    parts = []
    for begin in range(0, len(tokens), _ROWS_AT_ONCE):
        end = begin + _ROWS_AT_ONCE
        parts.append(_measure(logits[begin:end].float(), tokens[begin:end], top, columns))
    if len(parts) == 1:
        return parts[0]
    return Measured(*(torch.cat(some) for some in zip(*parts, strict=True)))


def _measure(
    logits: torch.Tensor, tokens: torch.Tensor, top: int, columns: torch.Tensor
) -> Measured:
    total = logits.logsumexp(-1, keepdim=True)
    values, places = logits.topk(min(top, logits.shape[1]), dim=-1)
    return Measured(
        own=(logits.gather(1, tokens[:, None]) - total)[:, 0],
        best_ids=places,
        best=values - total,
        chosen=logits[:, columns] - total,
    )


def word(measured: Measured, tokens: Sequence[int], ids: Sequence[int]) -> list[TokenLogprob]:
    """Report on one position after another.

    Args:
        measured: on the CPU.
        tokens: the token that stands at each position.
        ids: as they were asked for.
    """
    own: list[float] = measured.own.tolist()
    best_ids: list[list[int]] = measured.best_ids.tolist()
    best: list[list[float]] = measured.best.tolist()
    chosen: list[list[float]] = measured.chosen.tolist()
    return [
        TokenLogprob(
            token,
            own[row],
            tuple(zip(best_ids[row], best[row], strict=True)),
            tuple(zip(ids, chosen[row], strict=True)),
        )
        for row, token in enumerate(tokens)
    ]
