"""A small Llama and the GGUF file that llama.cpp's own converter would make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of two layers, with two query heads for each key head and tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


def write_gguf(
    model: LlamaForCausalLM, path: Path, *, split: str = "gpt-2", quantized: bool = False
) -> None:
    """Write a model and a byte-level tokenizer with one merge.

    Args:
        model: a Llama.
        path: the file to make.
        split: the name of the way to split text (`tokenizer.ggml.pre`).
        quantized: store matrices in blocks of 8-bit numbers instead of float32.
    """
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, split)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            values = _stored(name, tensor, model).numpy()
            kind = gguf.GGMLQuantizationType.Q8_0 if quantized and tensor.ndim == 2 else None
            blocks = values if kind is None else gguf.quants.quantize(values, kind)
            writer.add_tensor(_gguf_name(name), blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, split: str) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([*special, *sorted(ByteLevel.alphabet()), "he"])
    writer.add_token_types([3] * len(special) + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _stored(name: str, tensor: torch.Tensor, model: LlamaForCausalLM) -> torch.Tensor:
    # llama.cpp turns pairs of neighbours where transformers turns halves, so rows change places.
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return tensor.contiguous()
    rows, columns = tensor.shape
    halves = tensor.reshape(count, 2, rows // count // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()
