"""The model's own processor: an image file becomes pixels and the tokens that stand for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Idefics3Processor
from transformers.processing_utils import ProcessorMixin

from .errors import InvalidRequest, ModelError
from .image_files import decode_image

__all__ = ["ImageProcessor", "Processed"]

# transformers prepares pixels with Pillow or with torchvision, and the two differ a little. This
# one is there wherever Pillow is, and gives the same pixels everywhere.
_BACKEND = "pil"


@dataclass(frozen=True, slots=True)
class Processed:
    """An image before the vision tower.

    Args:
        ids: the tokens that a prompt has for it.
        pixels: what the tower is called with, by name.
    """

    ids: tuple[int, ...]
    pixels: Mapping[str, torch.Tensor]


class ImageProcessor:
    """Prepares images as the model was trained on them.

    Args:
        processor: transformers' own.
        most_pixels: width times height of an image at most.
    """

    def __init__(self, processor: ProcessorMixin, most_pixels: int) -> None:
        self._processor: Any = processor
        self._most_pixels = most_pixels
        self._names = frozenset(self._processor.image_processor.model_input_names)

    @classmethod
    def load(cls, path: Path, most_pixels: int) -> ImageProcessor:
        """Load the processor of a model folder.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        try:
            return cls(_processor(path), most_pixels)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ModelError(
                f"no processor of images could be loaded from {path} "
                f"({type(error).__name__}: {error}). A folder needs processor_config.json or "
                "preprocessor_config.json beside config.json"
            ) from error

    @property
    def image_token(self) -> str:
        """The text that stands for an image."""
        return str(self._processor.image_token)

    @property
    def chat_template(self) -> str | None:
        """The template for messages that came with the processor, if one did."""
        template = getattr(self._processor, "chat_template", None)
        return template if isinstance(template, str) else None

    def __call__(self, data: bytes) -> Processed:
        """Prepare one image.

        Args:
            data: a PNG, JPEG, WebP or GIF file.

        Raises:
            InvalidRequest: it cannot be read.
        """
        image = decode_image(data, self._most_pixels)
        try:
            made = self._processor(
                text=[self.image_token],
                images=[image],
                return_tensors="pt",
                add_special_tokens=False,
            )
        except Exception as error:  # some shapes are too much for some processors
            raise InvalidRequest(
                "images",
                f"the model's processor takes no image of {image.width} x {image.height} pixels "
                f"({type(error).__name__}: {error})",
            ) from error
        pixels = {name: made[name] for name in self._names if name in made}
        return Processed(tuple(made["input_ids"][0].tolist()), pixels)


def _processor(path: Path) -> ProcessorMixin:
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    auto: Any = AutoProcessor
    image_processor: Any = AutoImageProcessor
    given, _ = ProcessorMixin.get_processor_dict(path, local_files_only=True)
    if given.get("processor_class") == "SmolVLMProcessor":
        # It wants torchvision for videos. Images are written into its prompts as Idefics3's are.
        images = image_processor.from_pretrained(path, backend=_BACKEND, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        length = int(given.get("image_seq_len", 169))
        return Idefics3Processor(
            images, tokenizer, image_seq_len=length, chat_template=given.get("chat_template")
        )
    processor: ProcessorMixin = auto.from_pretrained(path, backend=_BACKEND, **options)
    return processor
