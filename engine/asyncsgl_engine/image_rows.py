"""Finds what of seated sequences' images a step reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .images import PlacedImage
from .inputs import Inserts
from .plan import Plan, Row
from .transfer import upload

__all__ = ["ImageRows"]


class ImageRows:
    """The images of the sequences that have a slot.

    Args:
        device: where steps are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._images: dict[int, tuple[PlacedImage, ...]] = {}

    def seat(self, slot: int, images: Sequence[PlacedImage]) -> None:
        """Take over a sequence that got a slot, in the place of the one before it."""
        if images:
            self._images[slot] = tuple(images)
        else:
            self._images.pop(slot, None)

    def read(self, plan: Plan) -> Inserts | None:
        """What the tokens of a step have instead of their own embeddings, if any does.

        A step may begin and end in the middle of an image.
        """
        if not self._images:
            return None
        places: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        values: list[torch.Tensor] = []
        begin = 0
        for row in plan.rows:
            for placed in self._images.get(row.slot, ()):
                first, last = _part(placed, row)
                if first < last:
                    offset = placed.start - row.start + begin
                    places.append(placed.image.places[first:last] + offset)
                    values.append(placed.image.embeddings[first:last])
            begin += len(row.tokens)
        if not places:
            return None
        rows = upload(np.concatenate(places), self._device)
        return Inserts(rows, torch.cat(values).to(self._device))


def _part(placed: PlacedImage, row: Row) -> tuple[int, int]:
    """Which of an image's embeddings a row reads."""
    begin = row.start - placed.start
    end = begin + len(row.tokens)
    if begin >= len(placed.image.ids) or end <= 0:
        return 0, 0
    first, last = np.searchsorted(placed.image.places, (begin, end))
    return int(first), int(last)
