"""Models that read images: their language model, and what turns pixels into embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from .errors import ModelError

__all__ = ["FAMILIES", "VisionTower", "check_eyes", "has_eyes", "load_vision"]

FAMILIES = ("idefics3", "llava", "llava_next", "smolvlm")
"""Kinds of models whose images stand where placeholder tokens are, in a plain causal decoder."""


@dataclass(frozen=True, slots=True)
class VisionTower:
    """The part of a model that reads images.

    Args:
        module: the whole model.
        image_token_id: the placeholder.
    """

    module: PreTrainedModel
    image_token_id: int

    @torch.inference_mode()
    def embeddings(self, pixels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the language model reads in place of an image's placeholders.

        Args:
            pixels: what the model's processor made of one image.

        Returns:
            (N, hidden), of the model's element type, in main memory.
        """
        device, dtype = self.module.device, self.module.dtype
        given = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in pixels.items()
        }
        module: Any = self.module
        found = module.get_image_features(**given, return_dict=True).pooler_output
        return torch.cat(list(found)).to("cpu", dtype)


def has_eyes(config: PreTrainedConfig) -> bool:
    """Whether images of a model are read here."""
    return config.model_type in FAMILIES


def check_eyes(config: PreTrainedConfig) -> None:
    """Refuse models that read images in another way.

    Raises:
        ModelError: the model is one of them.
    """
    kind = type(config)
    if (
        has_eyes(config)
        or kind in MODEL_FOR_CAUSAL_LM_MAPPING
        or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        return
    text: Any = config.get_text_config(decoder=True)
    rotation = getattr(text, "rope_parameters", None) or {}
    why = "the engine does not know how its images and its text meet"
    if "mrope_section" in rotation:
        why = "its positions have three dimensions (M-RoPE), and the engine counts in one"
    raise ModelError(
        f"models of kind {config.model_type!r} are not run: {why}. "
        f"Models that read images are run of the kinds {', '.join(FAMILIES)}"
    )


def load_vision(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, VisionTower]:
    """Load a model that reads images.

    Args:
        path: folder with config.json and safetensors.
        dtype: of weights and arithmetic.

    Returns:
        Its language model as one of its own kind, and what reads images; they share weights.

    Raises:
        ModelError: its language model is of no kind of its own.
    """
    whole: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    whole.train(mode=False)
    config: Any = whole.config
    return _language_model(whole), VisionTower(whole, int(config.image_token_id))


def _language_model(whole: PreTrainedModel) -> PreTrainedModel:
    """The text part in the class that it would have alone: all that knows that class runs it."""
    config = whole.config.get_text_config(decoder=True)
    with torch.device("meta"):
        alone: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    setattr(alone, alone.base_model_prefix, whole.get_decoder())  # type: ignore[no-untyped-call]
    alone.set_output_embeddings(whole.get_output_embeddings())  # type: ignore[no-untyped-call]
    missing = [name for name, weight in alone.named_parameters() if weight.is_meta]
    if missing:
        raise ModelError(
            f"the language model of {type(whole).__name__} is no {type(alone).__name__}: "
            f"{missing[0]} is missing"
        )
    return alone
