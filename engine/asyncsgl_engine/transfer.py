"""Small arrays to the device and back: many in one copy, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Download", "Place", "pack", "unpack", "upload", "upload_all"]

Array = npt.NDArray[np.generic]
_ALIGNMENT = 16  # bytes; what kernels may load at once


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies in a packed buffer.

    Args:
        begin: first byte.
        end: past the last one.
        dtype: of the elements.
        shape: of the array.
    """

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def upload(values: Array, device: torch.device) -> torch.Tensor:
    """One array, as a tensor on the device; on the CPU the two share memory."""
    if device.type == "cpu":
        return torch.from_numpy(values)
    return upload_all((values,), device)[0]


def upload_all(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """Each array as a tensor on the device, by one copy that the device's stream waits for.

    The copy starts from pinned memory: one from pageable memory would wait until the device has
    done all that was asked of it before. PyTorch gives pinned memory out again only after the
    copies from it have ended.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    buffer, places = pack(arrays, pin=device.type == "cuda")
    return unpack(buffer.to(device, non_blocking=True), places)


def pack(arrays: Sequence[Array], pin: bool) -> tuple[torch.Tensor, list[Place]]:
    """Copy arrays one behind another into one buffer of bytes.

    Args:
        arrays: of any element types.
        pin: whether the buffer is to be in pinned memory.
    """
    places, end = [], 0
    for array in arrays:
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + array.nbytes
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        places.append(Place(begin, end, dtype, array.shape))
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
    data = buffer.numpy()
    for array, place in zip(arrays, places, strict=True):
        data[place.begin : place.end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return buffer, places


def unpack(buffer: torch.Tensor, places: Sequence[Place]) -> list[torch.Tensor]:
    """The arrays in a packed buffer, as tensors that share its memory."""
    return [buffer[place.begin : place.end].view(place.dtype).view(place.shape) for place in places]


class Download:
    """Tensors on their way from the device; on the CPU they are there at once.

    Args:
        tensors: small ones; what they hold now is what is copied.
    """

    __slots__ = ("_done", "_tensors")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [_to_pinned(tensor) for tensor in tensors]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors, on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
