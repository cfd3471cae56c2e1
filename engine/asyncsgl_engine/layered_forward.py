"""A Llama-like model's forward pass in PyTorch's own operators: what needs no transformers."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear, silu

from .attention import AttentionBackend, LayerCall, StepContext
from .inputs import Batch
from .kv_cache import KVCache
from .native import DecoderWeights
from .native.weights import LayerWeights

__all__ = ["LayeredForward"]


class LayeredForward:
    """Rounds where transformers' modules do.

    Args:
        weights: of the model; all of them are kept.
        cache: keys and values.
        attention: computes the layers' attention.
    """

    def __init__(
        self, weights: DecoderWeights, cache: KVCache, attention: AttentionBackend
    ) -> None:
        self._weights, self._layers = weights, tuple(weights.layers)
        self._cache, self._attention = cache, attention

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """See `Forward`."""
        weights = self._weights
        context = StepContext(batch, self._cache, self._attention)
        stream = batch.embedded(lambda ids: embedding(ids, weights.embedding))
        turns = self._turns(batch.position_ids[0], stream.dtype)
        for index, layer in enumerate(self._layers):
            call = self._call(index, layer, self._even(stream, layer.norm), turns)
            attended = self._attention.attend(call, context).flatten(1)
            stream = stream + linear(attended, layer.output, layer.output_bias)
            hidden = self._even(stream, layer.mlp_norm)
            gated = silu(linear(hidden, layer.gate)) * linear(hidden, layer.up)
            stream = stream + linear(gated, layer.down)
        last = stream.index_select(0, batch.logit_rows)
        return linear(self._even(last, weights.norm), weights.head)

    def _even(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Root-mean-square norm (Zhang and Sennrich 2019) of the last dimension."""
        wide = values.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._weights.epsilon)
        return weight * (wide * scale).to(values.dtype)

    def _turns(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Cosines and sines, each (T, 1, head_dim)."""
        angles = positions[:, None].float() * self._weights.frequencies
        both = torch.cat((angles, angles), dim=-1)[:, None]
        scale = self._weights.rotary_scale
        return (both.cos() * scale).to(dtype), (both.sin() * scale).to(dtype)

    def _call(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        turns: tuple[torch.Tensor, ...],
    ) -> LayerCall:
        weights = self._weights
        matrices = (layer.query, layer.key, layer.value)
        biases: tuple[torch.Tensor | None, ...] = (None, None, None)
        if layer.biases is not None:
            biases = torch.split(layer.biases, [len(matrix) for matrix in matrices])
        query, key, value = (
            linear(hidden, matrix, bias).view(len(hidden), -1, weights.head_dim)
            for matrix, bias in zip(matrices, biases, strict=True)
        )
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._even(query, layer.query_norm), self._even(key, layer.key_norm)
        query, key = _turned(query, turns), _turned(key, turns)
        return LayerCall(query, key, value, index, weights.scale, layer.window, None)


def _turned(values: torch.Tensor, turns: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Turned by their positions, in halves (Su et al. 2021)."""
    cosines, sines = turns
    low, high = values.chunk(2, dim=-1)
    return values * cosines + torch.cat((-high, low), dim=-1) * sines
