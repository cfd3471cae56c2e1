"""Computes what the prompts of a batch have in common once, before the batch spreads out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ..backends.base import Backend
from ..backends.passing import PassingBackend
from ..errors import AsyncSGLError
from ..types import Delta, Generation, GenRequest, Message, SamplingParams, Scores

__all__ = ["SharedPrefix", "prefix_request"]

WORTHWHILE = 512
"""Characters that prompts must share before computing them ahead is worth a call."""

_numbers = itertools.count(1)


def prefix_request(text: str) -> GenRequest:
    """A request whose prompt is ``text``, for :meth:`Backend.cache_prefix`."""
    message = Message(None, (text,))
    return GenRequest((message,), SamplingParams(max_tokens=0), f"prefix-{next(_numbers):x}", text)


def _common_prefix(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    differ = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[:differ]


class SharedPrefix(PassingBackend):
    """A backend for one batch: the first two prompts are compared, then all go on.

    The first prompt goes to ``backend`` at once. If the second begins with the same long
    text, that text is computed ahead, and whatever comes meanwhile waits for it. Prompts that
    have little in common are held up by no more than the comparison.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._first: str | None = None
        self._settled = asyncio.Event()
        self._comparing = False

    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request; see :meth:`Backend.generate`."""
        await self._in_turn(request)
        return await self.backend.generate(request)

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; see :meth:`Backend.stream`."""
        await self._in_turn(request)
        async with aclosing(self.backend.stream(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score choices; see :meth:`Backend.score`."""
        await self._in_turn(request)
        return await self.backend.score(request, choices, unconditional=unconditional)

    async def _in_turn(self, request: GenRequest) -> None:
        if self._settled.is_set():
            return
        text = request.text
        if text is None or self._first is None:
            self._first = text
            return
        if self._comparing:
            await self._settled.wait()
            return
        self._comparing = True
        try:
            shared = _common_prefix(self._first, text)
            if len(shared) >= WORTHWHILE:
                await self._compute(shared)
        finally:
            self._settled.set()

    async def _compute(self, shared: str) -> None:
        try:
            await self.backend.cache_prefix(prefix_request(shared))
        except AsyncSGLError:
            return  # it only saves work: the requests themselves tell what is wrong
