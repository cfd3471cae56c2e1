"""Prompts with images: files become embeddings, and placeholders the tokens they stand at."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from .config import ResolvedConfig
from .errors import Closed, ImagesOverloaded, InvalidRequest, ModelError, Overloaded, PromptTooLong
from .images import PlacedImage, PreparedImage, Prompt
from .vision import VisionTower

if TYPE_CHECKING:
    from .image_processor import ImageProcessor

__all__ = ["ImageReader"]

Encode = Callable[[str], Sequence[int]]


class ImageReader:
    """Makes prompts of texts and images, one at a time in a thread of its own.

    Steps go on meanwhile. An image that was seen lately, or that a running request has, is not
    read again.

    Args:
        tower: the part of the model that reads images.
        processor: prepares them for it.
        encode: text to token ids.
        config: how many images, how much memory, how long a prompt.
    """

    def __init__(
        self, tower: VisionTower, processor: ImageProcessor, encode: Encode, config: ResolvedConfig
    ) -> None:
        self._tower = tower
        self._processor = processor
        self._encode = encode
        self._config = config
        self._memory = _Memory(config.image_memory)
        self._worker = ThreadPoolExecutor(1, "asyncsgl-images")
        self._pending = 0
        self._closed = False

    @property
    def image_token(self) -> str:
        """The text that stands for an image in a prompt."""
        return self._processor.image_token

    async def prompt(self, given: str | Sequence[int], images: Sequence[bytes]) -> Prompt:
        """A prompt of text and images.

        Args:
            given: text or token ids; each image stands where the image token is.
            images: PNG, JPEG, WebP or GIF files, in their order.

        Raises:
            InvalidRequest: images and image tokens do not go together, or an image cannot be
                read.
            PromptTooLong: its tokens and those of its images are too many.
            Overloaded: too many prompts wait for their images, or too much memory is taken.
            Closed: the engine was shut down.
        """
        if self._pending >= self._config.max_queued_requests:
            raise Overloaded(self._pending, self._config.max_queued_requests)
        self._pending += 1
        try:
            future = self._worker.submit(self._prompt, given, images)
        except RuntimeError as error:
            self._pending -= 1
            raise _closed() from error
        future.add_done_callback(self._done)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise _closed() from None
            raise

    def close(self) -> None:
        """Stop after the image that is being read; waiting prompts get `Closed`."""
        self._closed = True
        self._worker.shutdown(cancel_futures=True)

    def _done(self, _future: object) -> None:
        self._pending -= 1

    # -- in the thread ------------------------------------------------------------------------

    def _prompt(self, given: str | Sequence[int], images: Sequence[bytes]) -> Prompt:
        ids = self._encode(given) if isinstance(given, str) else given
        token = self._tower.image_token_id
        places = [index for index, each in enumerate(ids) if each == token]
        self._check_count(len(places), len(images))
        made: list[int] = []
        placed: list[PlacedImage] = []
        begin = 0
        for place, data in zip(places, images, strict=True):
            made += ids[begin:place]
            image = self._prepared(data, len(made) + len(ids) - place - 1)
            placed.append(PlacedImage(image, len(made)))
            made += image.ids
            begin = place + 1
        made += ids[begin:]
        return Prompt(tuple(made), tuple(placed))

    def _check_count(self, places: int, images: int) -> None:
        if places != images:
            raise InvalidRequest(
                "images",
                f"the prompt has {places} places for {images} images; each image stands where "
                f"{self.image_token!r} is",
            )

    def _prepared(self, data: bytes, others: int) -> PreparedImage:
        """One image, beside so many other tokens."""
        digest = hashlib.sha256(data).digest()
        image = self._memory.get(digest)
        if image is None:
            image = self._read(data, digest, others)
        self._check_length(others + len(image.ids))
        return image

    def _read(self, data: bytes, digest: bytes, others: int) -> PreparedImage:
        processed = self._processor(data)
        self._check_length(others + len(processed.ids))
        ids = np.array(processed.ids, dtype=np.int64)
        places = np.flatnonzero(ids == self._tower.image_token_id)
        embeddings = self._tower.embeddings(processed.pixels)
        if len(embeddings) != len(places):
            raise ModelError(
                f"the model's processor gives an image {len(places)} places, its vision tower "
                f"{len(embeddings)} embeddings: the two are of different models"
            )
        key = -1 - int.from_bytes(digest)
        image = PreparedImage(key, processed.ids, places, embeddings)
        self._memory.put(digest, image)
        return image

    def _check_length(self, tokens: int) -> None:
        limit = self._config.sequence_limit - 1
        if tokens > limit:
            raise PromptTooLong(tokens, limit, "with its images")


class _Memory:
    """The images of requests that wait or run, and those that may come again.

    Args:
        limit: bytes of embeddings at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._alive: WeakValueDictionary[bytes, PreparedImage] = WeakValueDictionary()
        self._kept: OrderedDict[bytes, PreparedImage] = OrderedDict()

    def get(self, digest: bytes) -> PreparedImage | None:
        """The image, if it is still there."""
        image = self._alive.get(digest)
        if image is not None:
            self._keep(digest, image)
        return image

    def put(self, digest: bytes, image: PreparedImage) -> None:
        """Keep an image, and give up the least recently used ones that nothing else holds.

        Raises:
            InvalidRequest: it alone is too large.
            ImagesOverloaded: the images of other requests leave no room.
        """
        if image.size > self._limit:
            problem = f"an image takes {image.size} bytes of {self._limit} (image_memory)"
            raise InvalidRequest("images", problem)
        while (held := self._held()) + image.size > self._limit:
            if not self._kept:
                raise ImagesOverloaded(held, self._limit)
            self._kept.popitem(last=False)
        self._alive[digest] = image
        self._keep(digest, image)

    def _keep(self, digest: bytes, image: PreparedImage) -> None:
        self._kept[digest] = image
        self._kept.move_to_end(digest)

    def _held(self) -> int:
        return sum(image.size for image in self._alive.values())


def _closed() -> Closed:
    return Closed("the engine was shut down while this prompt waited for its images")
