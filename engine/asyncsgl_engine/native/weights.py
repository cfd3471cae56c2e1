"""Reads the weights of a Llama-like transformers model, where it is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["DecoderWeights", "LayerWeights", "read_weights"]

# Classes whose forward pass is: embed, then for each layer a normalised attention with rotary
# positions and a normalised gated multilayer perceptron with SiLU, each added to its input.
_KNOWN = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_STEADY_ROTATIONS = frozenset({"default", "linear", "llama3"})


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


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole model.

    Args:
        layers: in order.
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

    layers: tuple[LayerWeights, ...]
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


def read_weights(module: nn.Module) -> DecoderWeights | None:
    """The weights of a model of a kind that the C code computes; None for any other.

    Args:
        module: a causal language model of transformers.
    """
    if type(module).__name__ not in _KNOWN or not _plain(module):
        return None
    config: Any = module.config
    model = module.get_submodule("model")
    rotary: Any = model.get_submodule("rotary_emb")
    attention: Any = model.get_submodule("layers.0.self_attn")
    layers = tuple(_layer(layer) for layer in model.get_submodule("layers").children())
    return DecoderWeights(
        layers=layers,
        embedding=model.get_parameter("embed_tokens.weight"),
        head=module.get_parameter("lm_head.weight"),
        norm=model.get_parameter("norm.weight"),
        frequencies=rotary.get_buffer("inv_freq"),
        rotary_scale=float(rotary.attention_scaling),
        epsilon=float(config.rms_norm_eps),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(attention.head_dim),
        scale=float(attention.scaling),
    )


def _plain(module: nn.Module) -> bool:
    """Whether nothing about a model of a known class is out of the ordinary."""
    config: Any = module.config
    rotary: Any = module.get_submodule("model.rotary_emb")
    mlp = module.get_submodule("model.layers.0.mlp")
    biased = any(
        getattr(mlp.get_submodule(name), "bias", None) is not None
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    return (
        not biased
        and config.hidden_act in ("silu", "swish")
        and rotary.rope_type in _STEADY_ROTATIONS
        and module.get_submodule("lm_head").bias is None
        and all(type(part) is nn.Linear for part in _linears(module))
    )


def _linears(module: nn.Module) -> list[nn.Module]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [part for name, part in module.named_modules() if name.rpartition(".")[2] in names]


def _layer(layer: nn.Module) -> LayerWeights:
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    projections = [attention.get_submodule(f"{name}_proj") for name in "qkv"]
    biases: list[torch.Tensor] = [
        bias for part in projections if (bias := _optional(part, "bias")) is not None
    ]
    return LayerWeights(
        query=projections[0].get_parameter("weight"),
        key=projections[1].get_parameter("weight"),
        value=projections[2].get_parameter("weight"),
        output=attention.get_parameter("o_proj.weight"),
        gate=mlp.get_parameter("gate_proj.weight"),
        up=mlp.get_parameter("up_proj.weight"),
        down=mlp.get_parameter("down_proj.weight"),
        biases=torch.cat(biases) if biases else None,
        output_bias=_optional(attention, "o_proj.bias"),
        norm=layer.get_parameter("input_layernorm.weight"),
        mlp_norm=layer.get_parameter("post_attention_layernorm.weight"),
        query_norm=_optional(attention, "q_norm.weight"),
        key_norm=_optional(attention, "k_norm.weight"),
        window=_window(attention),
    )


def _optional(module: nn.Module, name: str) -> torch.Tensor | None:
    return dict(module.named_parameters()).get(name)


def _window(attention: Any) -> int | None:
    """As the module itself passes it to attention: from itself, or from its configuration."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
    elif type(attention).__name__ == "MistralAttention":
        window = getattr(attention.config, "sliding_window", None)
    else:
        window = None
    return window
