"""Images as the model reads them, and where they stand in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = ["PlacedImage", "PreparedImage", "Prompt", "keys_of"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PreparedImage:
    """An image after the model's own processor and vision tower.

    Args:
        key: stands for its content; below 0, so that it is no token's id.
        ids: the tokens that a prompt has for it, placeholders and what stands around them.
        places: which of `ids` are placeholders, ascending, int64 (N,).
        embeddings: what the model reads there instead of the placeholder's own embedding, in
            main memory, (N, hidden).
    """

    key: int
    ids: tuple[int, ...]
    places: npt.NDArray[np.int64]
    embeddings: torch.Tensor

    @property
    def size(self) -> int:
        """Bytes of its embeddings."""
        return self.embeddings.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class PlacedImage:
    """An image at its place in a prompt.

    Args:
        image: what the model reads.
        start: the position of the first of its tokens.
    """

    image: PreparedImage
    start: int

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.image.ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine takes it.

    Args:
        ids: token ids, those of the images included.
        images: in their order.
    """

    ids: tuple[int, ...]
    images: tuple[PlacedImage, ...] = ()


def keys_of(tokens: Sequence[int], images: Sequence[PlacedImage]) -> list[int]:
    """What a prompt's pages are found by: token ids, and for placeholders their image's key.

    Placeholders are the same token in every image, so that token ids alone would take one
    image's keys and values for another's. SGLang fills prompts with such values too.
    """
    keys = list(tokens)
    for placed in images:
        for position in (placed.start + placed.image.places).tolist():
            keys[position] = placed.image.key
    return keys
