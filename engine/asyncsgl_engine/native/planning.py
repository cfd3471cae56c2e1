"""Makes the plan of a transformers model whose forward pass the engine can compute itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from .weights import DecoderPlan, DecoderWeights, LayerPlan

__all__ = ["plan_weights", "read_weights"]

# Classes whose forward pass is: embed, then for each layer a normalised attention with rotary
# positions and a normalised gated multilayer perceptron with SiLU, each added to its input.
_KNOWN = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_STEADY_ROTATIONS = frozenset({"default", "linear", "llama3"})


def plan_weights(module: nn.Module) -> DecoderPlan | None:
    """What there is to a model of a kind that the C code computes; None for any other.

    Args:
        module: a causal language model of transformers. It has a parameter of each name that
            the plan names, and one that is used twice has one name.
    """
    if type(module).__name__ not in _KNOWN or not _plain(module):
        return None
    config: Any = module.config
    rotary: Any = module.get_submodule("model.rotary_emb")
    attention: Any = module.get_submodule("model.layers.0.self_attn")
    layers = module.get_submodule("model.layers").named_children()
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tied = module.get_parameter(head) is module.get_parameter(embedding)
    return DecoderPlan(
        layers=tuple(_layer(f"model.layers.{name}.", layer) for name, layer in layers),
        embedding=embedding,
        head=embedding if tied else head,
        norm="model.norm.weight",
        frequencies=tuple(rotary.get_buffer("inv_freq").float().tolist()),
        rotary_scale=float(rotary.attention_scaling),
        epsilon=float(config.rms_norm_eps),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(attention.head_dim),
        scale=float(attention.scaling),
    )


def read_weights(module: nn.Module) -> DecoderWeights | None:
    """The weights of a model of a kind that the C code computes; None for any other.

    Args:
        module: a causal language model of transformers.
    """
    plan = plan_weights(module)
    return None if plan is None else plan.read(module.get_parameter)


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


def _layer(prefix: str, layer: nn.Module) -> LayerPlan:
    there = {name for name, _ in layer.named_parameters(remove_duplicate=False)}

    def optional(name: str) -> str | None:
        return prefix + name if name in there else None

    biases = [optional(f"self_attn.{part}_proj.bias") for part in "qkv"]
    return LayerPlan(
        query=f"{prefix}self_attn.q_proj.weight",
        key=f"{prefix}self_attn.k_proj.weight",
        value=f"{prefix}self_attn.v_proj.weight",
        output=f"{prefix}self_attn.o_proj.weight",
        gate=f"{prefix}mlp.gate_proj.weight",
        up=f"{prefix}mlp.up_proj.weight",
        down=f"{prefix}mlp.down_proj.weight",
        biases=tuple(name for name in biases if name is not None),
        output_bias=optional("self_attn.o_proj.bias"),
        norm=f"{prefix}input_layernorm.weight",
        mlp_norm=f"{prefix}post_attention_layernorm.weight",
        query_norm=optional("self_attn.q_norm.weight"),
        key_norm=optional("self_attn.k_norm.weight"),
        window=_window(layer.get_submodule("self_attn")),
    )


def _window(attention: Any) -> int | None:
    """As the module itself passes it to attention: from itself, or from its configuration."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
    elif type(attention).__name__ == "MistralAttention":
        window = getattr(attention.config, "sliding_window", None)
    else:
        window = None
    return window
