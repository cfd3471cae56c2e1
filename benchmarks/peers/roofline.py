"""The least time a workload can take on a machine with given rates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.workloads import Workload

__all__ = ["Limits", "ModelSize", "least_seconds"]

_ELEMENT = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Limits:
    """What the machine reached, the best of all that was tried.

    Args:
        bytes_s: memory read, bytes a second.
        flop_s: matrix products in the type of the weights, operations a second.
    """

    bytes_s: float
    flop_s: float

    @classmethod
    def of(cls, figures: dict[str, dict[str, dict[str, float]]], dtype: str) -> Limits:
        """From the figures of `machine`; memory is as fast in any type."""
        read = max(rate for each in figures.values() for rate in each["bytes_s"].values())
        return cls(read, max(figures[dtype]["flop_s"].values()))


@dataclass(frozen=True)
class ModelSize:
    """What a decoder of the Llama kind computes with.

    Args:
        layers: weights in the matrices of all layers together.
        head: weights of the output matrix.
        attention: operations for each token and each token it looks at.
        cache: elements of keys and values a token, all layers together.
    """

    layers: int
    head: int
    attention: int
    cache: int

    @classmethod
    def read(cls, folder: Path) -> ModelSize:
        """From a model folder's `config.json`."""
        config = json.loads((folder / "config.json").read_text())
        hidden, depth = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or hidden // heads
        inner = heads * width
        keys = config.get("num_key_value_heads", heads) * width
        layer = hidden * (2 * inner + 2 * keys + 3 * config["intermediate_size"])
        return cls(
            depth * layer, hidden * config["vocab_size"], 4 * inner * depth, 2 * keys * depth
        )


def least_seconds(workload: Workload, size: ModelSize, limits: Limits, dtype: str) -> float:
    """Seconds if prompts cost their products and each further step the slower of two things.

    Those are reading all weights and the products of its rows; reading keys and values comes on
    top. No prefix is computed twice, all requests are in every step they need, and nothing else
    takes time.
    """
    flops = 2.0 * size.layers * workload.distinct_prompt_tokens
    flops += 2.0 * size.head * len(workload.asks)
    flops += size.attention * _looked_at(workload)
    total = flops / limits.flop_s
    element = _ELEMENT[dtype]
    weights = size.layers + size.head
    for step in range(1, max(ask.output for ask in workload.asks)):
        lengths = [len(ask.prompt) + step for ask in workload.asks if ask.output > step]
        total += max(
            element * weights / limits.bytes_s, 2.0 * weights * len(lengths) / limits.flop_s
        )
        total += element * size.cache * sum(lengths) / limits.bytes_s
    return total


def _looked_at(workload: Workload) -> float:
    """Pairs of a computed prompt token and a token before it, or itself."""
    shared = workload.shared
    pairs = shared * (shared + 1) / 2
    for ask in workload.asks:
        end = len(ask.prompt)
        pairs += (end * (end + 1) - shared * (shared + 1)) / 2
    return pairs
