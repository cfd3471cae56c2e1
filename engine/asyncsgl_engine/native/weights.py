"""The weights of a Llama-like model, and the plan by which they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch

__all__ = ["DecoderPlan", "DecoderWeights", "LayerPlan", "LayerWeights", "Read"]

Read = Callable[[str], torch.Tensor]
"""Gives the parameter of a name."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, as transformers keeps it: matrices are (outputs, inputs).

    Args:
        query, key, value, output: projections of the attention.
        gate, up, down: of the multilayer perceptron.
        biases: of query, key and value, one after the other; None without.
        output_bias: of `output`.
        norm, mlp_norm: what the inputs of either half are normalised with.
        query_norm, key_norm: what each head is normalised with; None where heads are not.
        window: positions a token sees; None for all before it.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    biases: torch.Tensor | None
    output_bias: torch.Tensor | None
    norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    window: int | None

    def copied(self) -> LayerWeights:
        """The same in memory of its own, where these may be parts of a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        copies: dict[str, Any] = {
            name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **copies)


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole model.

    Args:
        layers: in order; each is read when it is asked for, each time.
        embedding: (vocab, hidden).
        head: (vocab, hidden); may be the embedding.
        norm: before the head.
        frequencies: radians a position, of the rotary embedding; (head_dim / 2,).
        rotary_scale: factor on its sines and cosines.
        epsilon: of the norms.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: elements of a head.
        scale: factor on the scores.
    """

    layers: Sequence[LayerWeights]
    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    frequencies: torch.Tensor
    rotary_scale: float
    epsilon: float
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The names of one layer's parameters; see `LayerWeights`.

    Args:
        biases: those of query, key and value; empty without.
        window: positions a token sees; None for all before it.
    """

    query: str
    key: str
    value: str
    output: str
    gate: str
    up: str
    down: str
    biases: tuple[str, ...]
    output_bias: str | None
    norm: str
    mlp_norm: str
    query_norm: str | None
    key_norm: str | None
    window: int | None

    @property
    def names(self) -> Iterator[str]:
        """Of all parameters."""
        for field in fields(self):
            match getattr(self, field.name):
                case str(name):
                    yield name
                case tuple(several):
                    yield from several

    def read(self, read: Read) -> LayerWeights:
        """The parameters themselves."""

        def optional(name: str | None) -> torch.Tensor | None:
            return None if name is None else read(name)

        return LayerWeights(
            query=read(self.query),
            key=read(self.key),
            value=read(self.value),
            output=read(self.output),
            gate=read(self.gate),
            up=read(self.up),
            down=read(self.down),
            biases=torch.cat([read(name) for name in self.biases]) if self.biases else None,
            output_bias=optional(self.output_bias),
            norm=read(self.norm),
            mlp_norm=read(self.mlp_norm),
            query_norm=optional(self.query_norm),
            key_norm=optional(self.key_norm),
            window=self.window,
        )


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """All that there is to a whole model but its parameters; see `DecoderWeights`.

    Args:
        layers: in order.
        embedding, head, norm: names of parameters.
        frequencies: radians a position, of the rotary embedding; head_dim / 2 of them.
    """

    layers: tuple[LayerPlan, ...]
    embedding: str
    head: str
    norm: str
    frequencies: tuple[float, ...]
    rotary_scale: float
    epsilon: float
    heads: int
    kv_heads: int
    head_dim: int
    scale: float

    @property
    def names(self) -> frozenset[str]:
        """Of all parameters."""
        own = {self.embedding, self.head, self.norm}
        return frozenset(own.union(*(layer.names for layer in self.layers)))

    def read(self, read: Read) -> DecoderWeights:
        """The parameters themselves, layers when they are asked for."""
        embedding = read(self.embedding)
        return DecoderWeights(
            layers=_Layers(self.layers, read),
            embedding=embedding,
            head=embedding if self.head == self.embedding else read(self.head),
            norm=read(self.norm),
            frequencies=torch.tensor(self.frequencies, device=embedding.device),
            rotary_scale=self.rotary_scale,
            epsilon=self.epsilon,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
        )


class _Layers(Sequence[LayerWeights]):
    """Layers that are read one at a time, so that not all of them need be in memory at once."""

    def __init__(self, plans: Sequence[LayerPlan], read: Read) -> None:
        self._plans, self._read = plans, read

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return _Layers(self._plans[index], self._read)
        return self._plans[index].read(self._read)

    def __len__(self) -> int:
        return len(self._plans)
