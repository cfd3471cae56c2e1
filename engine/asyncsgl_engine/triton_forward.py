"""A Llama-like model's forward pass in few launches: what CUDA devices compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, linear

from .attention import AttentionBackend, LayerCall, StepContext
from .inputs import Batch
from .kv_cache import KVCache
from .native.weights import DecoderWeights, LayerWeights

__all__ = ["TritonForward"]

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, its projections joined."""

    joined: torch.Tensor
    biases: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    gated: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    mlp_norm: torch.Tensor
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    window: int | None


class TritonForward:
    """Ten launches a layer or so, where transformers' module makes forty.

    The module's projections are joined in place: its parameters become views of the joined
    matrices, so that no weight is held twice and the module can go on being used.

    Args:
        weights: of the model; kept on their device.
        cache: keys and values.
        attention: computes the layers' attention.
        positions: most positions of a sequence.

    Raises:
        ImportError: there is no Triton.
    """

    def __init__(
        self, weights: DecoderWeights, cache: KVCache, attention: AttentionBackend, positions: int
    ) -> None:
        from . import triton_layers

        self._kernels: Any = triton_layers
        self._weights, self._cache, self._attention = weights, cache, attention
        self._layers = [_joined(layer) for layer in weights.layers]
        self._turns = _turns(weights, positions)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """See `Forward`."""
        weights = self._weights
        context = StepContext(batch, self._cache, self._attention)
        stream = batch.embedded(lambda ids: embedding(ids, weights.embedding))
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            hidden = self._add_norm(stream, delta, layer.norm)
            call = self._call(linear(hidden, layer.joined, layer.biases), batch, index)
            attended = self._attention.attend(call, context).flatten(1)
            delta = linear(attended, layer.output, layer.output_bias)
            hidden = self._add_norm(stream, delta, layer.mlp_norm)
            delta = linear(self._gate(linear(hidden, layer.gated)), layer.down)
        stream = stream.index_select(0, batch.logit_rows)
        if delta is not None:
            delta = delta.index_select(0, batch.logit_rows)
        return linear(self._add_norm(stream, delta, weights.norm), weights.head)

    def _add_norm(
        self, stream: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        rows, width = stream.shape
        out = torch.empty_like(stream)
        self._kernels.add_norm[(rows,)](
            stream,
            stream if delta is None else delta,
            weight,
            out,
            self._weights.epsilon,
            WIDTH=width,
            WIDTH_PAD=_padded(width),
            HAS_DELTA=delta is not None,
            num_warps=8 if width > 1024 else 4,
        )
        return out

    def _call(self, packed: torch.Tensor, batch: Batch, index: int) -> LayerCall:
        weights, layer = self._weights, self._layers[index]
        heads, kv_heads, dim = weights.heads, weights.kv_heads, weights.head_dim
        tokens = packed.shape[0]
        query_norm, key_norm = layer.head_norms or (packed, packed)
        self._kernels.rotate[(tokens, heads + kv_heads)](
            packed,
            batch.position_ids,
            self._turns,
            query_norm,
            key_norm,
            weights.epsilon,
            packed.stride(0),
            HEADS=heads,
            DIM=dim,
            HALF_PAD=_padded(dim // 2),
            HAS_NORMS=layer.head_norms is not None,
            num_warps=1,
        )
        parts = torch.split(packed.view(tokens, -1, dim), [heads, kv_heads, kv_heads], dim=1)
        query, key, value = parts
        return LayerCall(query, key, value, index, weights.scale, layer.window, None)

    def _gate(self, packed: torch.Tensor) -> torch.Tensor:
        rows, width = packed.shape[0], packed.shape[1] // 2
        out = packed.new_empty((rows, width))
        grid = (rows, -(-width // _BLOCK))
        self._kernels.gate[grid](packed, out, WIDTH=width, BLOCK=_BLOCK)
        return out


def _joined(layer: LayerWeights) -> _Layer:
    norms = None
    if layer.query_norm is not None and layer.key_norm is not None:
        norms = (layer.query_norm, layer.key_norm)
    return _Layer(
        joined=_join(layer.query, layer.key, layer.value),
        biases=layer.biases,
        output=layer.output,
        output_bias=layer.output_bias,
        gated=_join(layer.gate, layer.up),
        down=layer.down,
        norm=layer.norm,
        mlp_norm=layer.mlp_norm,
        head_norms=norms,
        window=layer.window,
    )


def _join(*parts: torch.Tensor) -> torch.Tensor:
    """One matrix of several with the same inputs; the parts become views of it."""
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True):
        part.data = view
    return whole


def _turns(weights: DecoderWeights, positions: int) -> torch.Tensor:
    """Cosines and sines of each position, (positions, 2, head_dim / 2) in float32."""
    frequencies = weights.frequencies.float()
    angles = torch.arange(positions, device=frequencies.device)[:, None] * frequencies
    # Rounded as transformers' rotary embedding gives them to its layers.
    turns = torch.stack([angles.cos(), angles.sin()], dim=1) * weights.rotary_scale
    return turns.to(weights.embedding.dtype).float()


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()
