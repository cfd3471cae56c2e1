"""A Llama-like model's whole forward pass in C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch.nn.functional import embedding

from ..inputs import Batch
from ..kv_cache import KVCache
from .build import SUFFIXES, Library
from .memory import Arena
from .step import MOST_DIM, MOST_GROUP, Step, Workspace
from .weights import DecoderWeights, LayerWeights

__all__ = ["NativeDecoder"]

Pointer = ctypes.c_void_p


class _Layer(ctypes.Structure):
    """`LayerWeights` of decoder.h."""

    _fields_ = (
        *((name, Pointer) for name in ("qkv", "output", "gate_up", "down")),
        *((name, Pointer) for name in ("qkv_bias", "output_bias", "norm", "mlp_norm")),
        *((name, Pointer) for name in ("query_norm", "key_norm", "keys", "values")),
        ("window", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    """`Model` of decoder.h."""

    _fields_ = (
        *((name, Pointer) for name in ("layers", "embedding", "head", "norm", "frequencies")),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden", "inner")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "vocab")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale", "rotary_scale")),
    )


class _Call(ctypes.Structure):
    """`Call` of decoder.h."""

    _fields_ = (
        *((name, Pointer) for name in ("input_ids", "positions", "logit_rows", "logits")),
        ("rows", ctypes.c_int64),
    )


class NativeDecoder:
    """Holds its own packed copy of the weights; the module they came from may go.

    Args:
        library: what `build_library` gave.
        weights: read from the model.
        cache: keys and values.
        threads: to compute with.
    """

    def __init__(
        self, library: Library, weights: DecoderWeights, cache: KVCache, threads: int
    ) -> None:
        dtype = weights.embedding.dtype
        self._pack_matrix = library.function("asyncsgl_pack", dtype)
        self._forward = library.function("asyncsgl_forward", dtype)
        self._space = library.function("asyncsgl_forward_space", dtype)
        self._space.restype = ctypes.c_int64
        self._columns = library.tile_columns
        self._cache, self._threads = cache, threads  # its memory is pointed into
        self._workspace = Workspace()
        self._logits = torch.empty(0)
        self._vocab = weights.head.shape[0]
        self._embedding = weights.embedding.detach()
        self._kept: list[torch.Tensor] = []
        self._arena = Arena()
        pairs = zip(weights.layers, cache.keys, cache.values, strict=True)
        layers = [self._layer(layer, keys, values) for layer, keys, values in pairs]
        self._layers = (_Layer * len(layers))(*layers)
        self._model = _Model(
            ctypes.addressof(self._layers),
            self._keep(self._embedding),
            self._pack([weights.head]),
            self._vector(weights.norm),
            self._vector(weights.frequencies),
            len(layers),
            weights.embedding.shape[1],
            weights.layers[0].gate.shape[0],
            weights.heads,
            weights.kv_heads,
            weights.head_dim,
            self._vocab,
            weights.epsilon,
            weights.scale,
            weights.rotary_scale,
        )

    @staticmethod
    def takes(weights: DecoderWeights) -> bool:
        """Whether a model of these sizes, and where it is, fits the compiled code."""
        first = weights.layers[0]
        widths = (matrix.shape[1] for matrix in (weights.embedding, first.output, first.down))
        return (
            weights.embedding.dtype in SUFFIXES
            and weights.embedding.device.type == "cpu"
            and all(width % 2 == 0 for width in widths)
            and weights.heads // weights.kv_heads <= MOST_GROUP
            and weights.head_dim <= MOST_DIM
            and weights.head_dim % 4 == 0
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Run one packed forward pass.

        Args:
            batch: on the CPU.

        Returns:
            float32 (R, vocab), for the batch's R `logit_rows`; valid until the next call.
        """
        step = Step(batch, self._cache.page_size, self._threads)
        rows = len(batch.logit_rows)
        logits = self._room(rows)
        input_ids, held = batch.input_ids, self._model
        if batch.inserts is not None:  # a table of this step's own
            table = batch.embedded(lambda ids: embedding(ids, self._embedding))
            input_ids = torch.arange(len(table))
            held = _Model.from_buffer_copy(self._model)
            held.embedding = table.data_ptr()
        call = _Call(
            input_ids.data_ptr(),
            batch.position_ids.data_ptr(),
            batch.logit_rows.data_ptr(),
            logits.data_ptr(),
            rows,
        )
        model, described = ctypes.byref(held), ctypes.byref(step.structure)
        step.use(self._workspace.of(self._space(model, described, ctypes.c_int64(rows))))
        self._forward(model, described, ctypes.byref(call))
        return logits

    def _room(self, rows: int) -> torch.Tensor:
        """For so many rows of logits: kept, since fresh memory costs more than filling it."""
        size = rows * self._vocab
        if self._logits.numel() < size:
            self._logits = torch.empty(size)
        return self._logits[:size].view(rows, self._vocab)

    def _layer(self, layer: LayerWeights, keys: torch.Tensor, values: torch.Tensor) -> _Layer:
        return _Layer(
            self._pack([torch.cat((layer.query, layer.key, layer.value))]),
            self._pack([layer.output]),
            self._pack([layer.gate, layer.up]),
            self._pack([layer.down]),
            *map(self._vector, (layer.biases, layer.output_bias, layer.norm, layer.mlp_norm)),
            *map(self._vector, (layer.query_norm, layer.key_norm)),
            keys.data_ptr(),
            values.data_ptr(),
            layer.window or 0,
        )

    def _pack(self, matrices: Sequence[torch.Tensor]) -> int:
        """Pack matrices of one shape, half a tile's columns of each by turns."""
        columns, inner = matrices[0].shape
        strips = -(-columns // (self._columns // 2)) * len(matrices)
        size = -(-strips // 2) * self._columns * inner
        packed = self._arena.take(size, matrices[0].dtype)
        for index, matrix in enumerate(matrices):
            self._pack_matrix(
                Pointer(matrix.detach().contiguous().data_ptr()),
                *map(ctypes.c_int64, (columns, inner, len(matrices), index)),
                Pointer(packed.data_ptr()),
            )
        return self._keep(packed)

    def _vector(self, values: torch.Tensor | None) -> int | None:
        if values is None:
            return None
        # A copy in any case: the original may be a part of a file that is let go.
        return self._keep(values.detach().to(torch.float32, copy=True).contiguous())

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()
