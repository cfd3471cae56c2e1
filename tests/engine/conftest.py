"""Tiny random models, saved as the engine loads them, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB = 300

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.5,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        **_SIZES, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=512
    ),
    "qwen2": lambda: Qwen2Config(
        **_SIZES,
        intermediate_size=96,
        num_key_value_heads=1,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
    ),
    "gpt2": lambda: GPT2Config(**_SIZES, n_positions=512),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes, three special tokens, and no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    assert (fast.bos_token_id, fast.eos_token_id) == (256, 257)
    return fast


def save_model(kind: str, folder: Path) -> Path:
    """Write a tiny random model of a kind, and the tokenizer, as a model folder."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random model: `llama`, `qwen2` or `gpt2`."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder
