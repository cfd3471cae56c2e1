"""Image files: from untrusted bytes to pixels."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decode_image"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MAY_MOVE = frozenset({"PNG", "WEBP", "GIF"})  # JPEG files may hold previews of the same image


def decode_image(data: bytes, most_pixels: int) -> Image:
    """Decode a still image, upright and in RGB.

    Its size is looked at before any pixel is decoded, so that a small file cannot fill the
    memory.

    Args:
        data: a PNG, JPEG, WebP or GIF file.
        most_pixels: width times height at most.

    Raises:
        InvalidRequest: it is none of these, damaged, moving or too large.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > most_pixels:
            raise _too_large(f"{width} x {height}", most_pixels)
        if image.format in _MAY_MOVE and getattr(image, "is_animated", False):
            raise InvalidRequest("images", "an image moves; send one frame of it")
        return ImageOps.exif_transpose(image).convert("RGB")
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("too many", most_pixels) from error
    except Exception as error:  # decoders fail on damaged files in all manner of ways
        kind = type(error).__name__
        raise InvalidRequest(
            "images", f"an image is not a whole {', '.join(FORMATS)} file ({kind})"
        ) from error


def _too_large(size: str, most_pixels: int) -> InvalidRequest:
    problem = f"an image has {size} pixels, at most {most_pixels} are read (max_image_pixels)"
    return InvalidRequest("images", problem)
