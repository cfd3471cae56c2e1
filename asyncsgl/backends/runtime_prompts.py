"""The prompts of a program's requests, as token ids and images for the local engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.images import Prompt

from ..types import GenRequest
from .runtime_images import RuntimeImages, images_of

__all__ = ["Continued", "RuntimePrompts"]

_INLINE_CHARACTERS = 4096
"""Texts up to this length are tokenised on the event loop: that takes less than a thread."""


class Continued(NamedTuple):
    """A prompt and what follows it, whose own tokens begin at ``start``."""

    prompt: Prompt
    start: int

    @property
    def ids(self) -> Sequence[int]:
        """The tokens of what follows."""
        return self.prompt.ids[self.start :]


class RuntimePrompts:
    """Makes prompts with a model's tokenizer and its reader of images.

    Args:
        engine: has them, once it is started.
        images: gets the files.
    """

    def __init__(self, engine: AsyncEngine, images: RuntimeImages) -> None:
        self._engine = engine
        self._images = images

    async def prompt(self, request: GenRequest, more: str = "") -> Prompt:
        """A request's text, and more text after it, with its images."""
        assert request.text is not None, "this backend wants text"
        text = request.text + more
        images = images_of(request)
        if images:
            files = [await self._images.file(image) for image in images]
            return await self._engine.prompt(text, files)
        ids = await self._encode(text)
        return Prompt(tuple(ids)) if ids else self.unprompted([]).prompt

    async def continued(self, request: GenRequest, prefix: Sequence[int], more: str) -> Continued:
        """A request's prompt and more text after it.

        Text that follows a prompt can change how the prompt's end is split into tokens, so it
        begins where the token ids of the two first differ.

        Args:
            request: asks for the prompt.
            prefix: the tokens of the prompt alone.
            more: the text after it.
        """
        prompt = await self.prompt(request, more)
        start = 0
        for mine, theirs in zip(prefix, prompt.ids, strict=False):
            if mine != theirs:
                break
            start += 1
        start = min(start, len(prompt.ids) - 1)
        return Continued(prompt, start) if start else self.unprompted(prompt.ids)

    def unprompted(self, ids: Sequence[int]) -> Continued:
        """Tokens with nothing before them: after the token that begins (or ends) a text."""
        tokenizer = self._engine.tokenizer
        begin = tokenizer.bos_token or tokenizer.eos_token
        first = tokenizer.encode(begin, add_special_tokens=False) if begin else [ids[0]]
        return Continued(Prompt((*first, *ids)), len(first))

    async def _encode(self, text: str) -> Sequence[int]:
        encode = self._engine.tokenizer.encode
        if len(text) <= _INLINE_CHARACTERS:
            return encode(text)
        return await asyncio.to_thread(encode, text)
