"""Tiny random models that read images, their processors, and pictures for them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.engine.conftest import byte_tokenizer

__all__ = ["KINDS", "VisionOracle", "picture", "save_vision_model"]

# As the models' own: turns whose content is a list of parts, images before the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n"
    "{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
_VISION: Any = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_SPREAD = 0.4
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_IDEFICS_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def _text(vocab: int, context: int = 1024) -> LlamaConfig:
    sizes: Any = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "initializer_range": 0.5,
    }
    return LlamaConfig(**sizes)


def _llava(kind: str) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    size: Any = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    shared: Any = {
        "vision_config": CLIPVisionConfig(**_VISION, image_size=28, patch_size=7),
        "text_config": _text(320),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    options: Any = {
        "tokenizer": tokenizer,
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    made: Any
    if kind == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
        made = LlavaProcessor
        return model, made(CLIPImageProcessorPil(**size), **options)
    config = LlavaNextConfig(**shared, image_grid_pinpoints=_PINPOINTS)
    images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=_PINPOINTS)
    made = LlavaNextProcessor
    return LlavaNextForConditionalGeneration(config), made(images, **options)


def _idefics3(kind: str) -> tuple[Any, Any]:
    tokenizer = _tokenizer(*_IDEFICS_TOKENS, *_TILES)
    tower: Any = {**_VISION, "image_size": 32, "patch_size": 8}
    shared: Any = {
        "text_config": _text(len(tokenizer)),
        "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    size: Any = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    options: Any = {"image_seq_len": 4, "chat_template": CHAT_TEMPLATE}
    config: Any
    images: Any
    if kind == "idefics3":
        config = Idefics3Config(vision_config=Idefics3VisionConfig(**tower), **shared)
        images = Idefics3ImageProcessorPil(**size)
        model: Any = Idefics3ForConditionalGeneration(config)
    else:
        config = SmolVLMConfig(vision_config=SmolVLMVisionConfig(**tower), **shared)
        images = SmolVLMImageProcessorPil(**size)
        model = SmolVLMForConditionalGeneration(config)
    return model, Idefics3Processor(images, tokenizer, **options)


_MAKERS: dict[str, Callable[[str], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
}
KINDS = tuple(_MAKERS)


def save_vision_model(kind: str, folder: Path) -> Path:
    """Write a tiny random model of a kind, its processor and its tokenizer, as a model folder."""
    torch.manual_seed(5)
    model, processor = _MAKERS[kind](kind)
    with torch.no_grad():  # as they are made, their images hardly differ
        for name, weight in model.named_parameters():
            if "language_model" not in name and "text_model" not in name and weight.dim() > 1:
                weight.normal_(std=_SPREAD)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 70, height: int = 40, form: str = "PNG") -> bytes:
    """An image file of coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


class VisionOracle:
    """transformers' own processor and greedy answers."""

    def __init__(self, folder: Path) -> None:
        auto: Any = AutoProcessor
        self.processor: Any = auto.from_pretrained(folder, backend="pil")
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)

    def inputs(self, text: str, images: Sequence[bytes]) -> Any:
        """What the processor makes of a prompt."""
        decoded: Any = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
        if decoded and isinstance(self.processor, Idefics3Processor):
            decoded = [decoded]
        processor: Any = self.processor
        return processor(text=[text], images=decoded or None, return_tensors="pt")

    def ids(self, text: str, images: Sequence[bytes]) -> tuple[int, ...]:
        """The prompt's token ids."""
        return tuple(self.inputs(text, images)["input_ids"][0].tolist())

    def __call__(self, text: str, images: Sequence[bytes], count: int) -> tuple[int, ...]:
        """The greedy answer to a prompt."""
        inputs = self.inputs(text, images)
        out = self.model.generate(
            **inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())
