"""A step as the C side reads it."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from ..inputs import Batch
from .sharing import find_groups

__all__ = ["MOST_DIM", "MOST_GROUP", "Step", "Workspace"]

MOST_GROUP, MOST_DIM = 16, 256

Pointer = ctypes.c_void_p


class StepStructure(ctypes.Structure):
    """`Step` of step.h."""

    _fields_ = (
        *((name, Pointer) for name in ("write_slots", "table", "lengths")),
        *((name, Pointer) for name in ("members", "group_first", "common")),
        *((name, Pointer) for name in ("span_begin", "span_length", "span_start", "span_slots")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("tokens", "singles", "groups", "spans", "page_size", "table_width", "threads"),
            )
        ),
        ("workspace", Pointer),
    )


def address(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
    """Where an array's elements begin."""
    return int(values.ctypes.data)


class Step:
    """One batch for the C side, and the arrays that it points into.

    Args:
        batch: on the CPU.
        page_size: tokens in a page.
        threads: to compute with.
    """

    def __init__(self, batch: Batch, page_size: int, threads: int) -> None:
        table = batch.page_table.contiguous()
        groups = find_groups(table.numpy(), batch.single_lengths.numpy(), page_size)
        spans = batch.spans
        slots = [span.slots for span in spans if span.slots is not None]
        assert len(slots) == len(spans), "the batch was built without its spans' slots"
        shapes = np.array(
            [
                [span.begin for span in spans],
                [span.length for span in spans],
                [span.start for span in spans],
                [part.data_ptr() for part in slots],
            ],
            dtype=np.int64,
        )
        self._kept = (batch, table, groups, shapes)
        line = shapes.strides[0]
        begins = address(shapes)
        self.structure = StepStructure(
            batch.write_slots.data_ptr(),
            table.data_ptr(),
            batch.single_lengths.data_ptr(),
            address(groups.members),
            address(groups.first),
            address(groups.common),
            *(begins + line * index for index in range(4)),
            batch.input_ids.shape[1],
            batch.singles,
            len(groups.common),
            len(spans),
            page_size,
            table.shape[1],
            threads,
            None,
        )

    def use(self, workspace: torch.Tensor) -> None:
        """Compute in this memory; it must be at least as large as the function's `_space` says."""
        self.structure.workspace = workspace.data_ptr()


class Workspace:
    """Memory that grows to the largest step so far."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> torch.Tensor:
        """At least `size` bytes, aligned to 64."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size + size // 4, dtype=torch.uint8)
        return self._memory
