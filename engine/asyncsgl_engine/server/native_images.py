"""Which images belong to which prompt of a `/generate` body, by SGLang's rules."""

from __future__ import annotations

from typing import Any

from .failures import Failure

__all__ = ["image_sources"]


def image_sources(data: Any, count: int, is_list: bool) -> list[list[str]]:
    """What names the images of each prompt.

    1. One prompt takes one image, a list of images, or a list with that list.
    2. Of a list of prompts each takes its own entry of a list: an image, a list of images, or
       null for none. One image that is not in a list goes to all of them.

    Args:
        data: `image_data` as sent.
        count: prompts.
        is_list: whether the prompts came as a list.

    Returns:
        For each prompt the paths, URLs, data URLs or base64 of its images, in their order.

    Raises:
        Failure: there is an entry too many or too few, or one names no image.
    """
    if not data:
        return [[] for _ in range(count)]
    if not is_list:
        match data:
            case [[*images]]:  # as SGLang wants it for several answers to one prompt
                return [_several(images)]
        return [_several(data)]
    if not isinstance(data, list):
        return [[_one(data)] for _ in range(count)]
    if len(data) != count:
        problem = f"image_data has {len(data)} entries for {count} prompts"
        raise Failure(400, problem, "image_data")
    return [_several(each) for each in data]


def _several(given: Any) -> list[str]:
    items = given if isinstance(given, list) else [given]
    return [_one(item) for item in items if item is not None]


def _one(item: Any) -> str:
    if isinstance(item, dict):
        item = item.get("url")
    if not isinstance(item, str) or not item:
        problem = "image_data: an image is a data URL, base64, a path or a URL, or {'url': one}"
        raise Failure(400, problem, "image_data")
    return item
