"""Decoding steps captured as CUDA graphs: one launch a step instead of one for each operation.

A graph repeats a forward pass with the same shapes on the same addresses. So there is one for
each of a ladder of batch sizes, all read the same input buffers, and a step is padded to the next
size. A row of padding has no context and no slot to write to; what is computed for it is dropped.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from .inputs import Batch

__all__ = ["Capture", "CudaGraphs", "GraphedForward", "StaticInputs", "capture_all", "ladder"]

Forward = Callable[[Batch], torch.Tensor]
Replay = Callable[[], torch.Tensor]

_log = logging.getLogger(__name__)
_WARM_UPS = 2


class Capture(Protocol):
    """Records computations on one device."""

    def __call__(self, compute: Replay) -> Replay:
        """Give what repeats `compute`, each time with the same tensor as its result."""
        ...


def ladder(most: int) -> tuple[int, ...]:
    """Batch sizes up to `most`: dense where a row of padding weighs much, sparse above."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(96, 257, 32), *range(320, most + 1, 64), most}
    return tuple(sorted(size for size in sizes if 0 < size <= most))


class StaticInputs:
    """The buffers that graphs read.

    Args:
        rows: of the largest graph.
        pages: of the longest sequence.
        page_size: tokens in a page.
        device: where they are.
    """

    def __init__(self, rows: int, pages: int, page_size: int, device: torch.device) -> None:
        self._longest = pages * page_size
        self._input_ids = torch.zeros((1, rows), dtype=torch.int64, device=device)
        self._position_ids = torch.zeros((1, rows), dtype=torch.int64, device=device)
        self._write_slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._table = torch.zeros((rows, pages), dtype=torch.int32, device=device)
        self._logit_rows = torch.arange(rows, device=device)

    def view(self, size: int) -> Batch:
        """The first `size` rows, as a batch whose rows all want logits."""
        return Batch(
            input_ids=self._input_ids[:, :size],
            position_ids=self._position_ids[:, :size],
            write_slots=self._write_slots[:size],
            singles=size,
            single_slots=None,
            single_lengths=self._lengths[:size],
            page_table=self._table[:size],
            longest_single=self._longest,
            spans=(),
            logit_rows=self._logit_rows[:size],
        )

    def load(self, batch: Batch, size: int) -> None:
        """Take over a batch of single tokens, and make padding of the rows up to `size`.

        Padding keeps the token and the position of an earlier step, which the model can compute.
        """
        rows, pages = batch.page_table.shape
        self._input_ids[:, :rows].copy_(batch.input_ids)
        self._position_ids[:, :rows].copy_(batch.position_ids)
        self._write_slots[:rows].copy_(batch.write_slots)
        self._lengths[:rows].copy_(batch.single_lengths)
        self._table[:rows, :pages].copy_(batch.page_table)
        if rows < size:
            self._write_slots[rows:size].fill_(-1)
            self._lengths[rows:size].zero_()


class GraphedForward:
    """Computes steps of single tokens by replaying graphs, all other steps as before.

    Args:
        eager: the forward pass without graphs.
        replays: what repeats it over so many rows of `inputs`.
        inputs: the buffers that they read.
    """

    def __init__(self, eager: Forward, replays: Mapping[int, Replay], inputs: StaticInputs) -> None:
        self._eager = eager
        self._replays = replays
        self._sizes = sorted(replays)
        self._inputs = inputs

    def size_for(self, batch: Batch) -> int | None:
        """The smallest graph that holds a batch; None where there is none."""
        place = bisect_left(self._sizes, batch.singles)
        eager = batch.spans or batch.inserts is not None or not batch.singles
        if eager or place == len(self._sizes):
            return None
        return self._sizes[place]

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch, (R, vocab)."""
        size = self.size_for(batch)
        if size is None:
            return self._eager(batch)
        self._inputs.load(batch, size)
        # Copied out, since the next replay writes to the same memory.
        return self._replays[size]().index_select(0, batch.logit_rows)


def capture_all(
    forward: Forward, sizes: Sequence[int], inputs: StaticInputs, capture: Capture
) -> GraphedForward | None:
    """Capture a forward pass at each size; None, and a warning, where it cannot be captured.

    Args:
        forward: over rows of `inputs`; must tolerate padding.
        sizes: batch sizes, at most the rows of `inputs`.
        inputs: as they are: nothing but padding.
        capture: records.
    """
    replays: dict[int, Replay] = {}
    try:
        # The largest first: the smaller ones then find room in its memory.
        for size in sorted(sizes, reverse=True):
            batch = inputs.view(size)
            replays[size] = capture(lambda batch=batch: forward(batch))  # type: ignore[misc]
    except RuntimeError as error:
        _log.warning("decoding runs without CUDA graphs: capturing failed (%s)", error)
        return None
    return GraphedForward(forward, replays, inputs)


class CudaGraphs:
    """Captures on the current CUDA device; all graphs share one pool of memory.

    They may, because they are replayed one after another on one stream, and each result is
    copied before the next replay.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def __call__(self, compute: Replay) -> Replay:
        """See `Capture`."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):  # kernels are compiled and libraries set up before capture
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay
