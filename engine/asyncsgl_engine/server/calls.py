"""Several sequences of one HTTP request, run together: all of them end with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import TypeVar

from ..engine import AsyncEngine
from ..request import Completion, Delta, Request

__all__ = ["complete", "stream"]

T = TypeVar("T")


async def complete(
    engine: AsyncEngine, requests: Sequence[Request], deadline: float | None
) -> list[Completion]:
    """Run requests to their ends; the first that fails ends the others.

    Args:
        engine: started.
        requests: at least one.
        deadline: in the event loop's time.

    Raises:
        EngineError: one of them failed.
        TimeoutError: the deadline passed.
    """
    async with asyncio.timeout_at(deadline):
        if len(requests) == 1:
            return [await engine.generate(requests[0])]
        return await _gathered([engine.generate(request) for request in requests])


async def _gathered(work: Sequence[Coroutine[object, object, T]]) -> list[T]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def stream(
    engine: AsyncEngine, requests: Sequence[Request], deadline: float | None
) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """Run requests and give what they bring, with their positions.

    A reader that is slower than the engine gets all that came meanwhile at once, one delta a
    request. Leaving early aborts them all.

    Raises:
        EngineError: one of them failed; the others are aborted.
        TimeoutError: the deadline passed.
    """
    mailbox = _Mailbox()
    tasks = [
        asyncio.ensure_future(_pump(engine, request, index, mailbox))
        for index, request in enumerate(requests)
    ]
    running = len(tasks)
    try:
        while running:
            async with asyncio.timeout_at(deadline):
                deltas = await mailbox.take()
            running -= sum(delta.finish is not None for _, delta in deltas)
            yield deltas
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _pump(engine: AsyncEngine, request: Request, index: int, mailbox: _Mailbox) -> None:
    try:
        async with aclosing(engine.stream(request)) as deltas:
            async for delta in deltas:
                mailbox.put(index, delta)
    except Exception as error:  # noqa: BLE001 - raised where the mailbox is emptied
        mailbox.fail(error)


class _Mailbox:
    """What came since it was last emptied."""

    __slots__ = ("_arrived", "_deltas", "_error")

    def __init__(self) -> None:
        self._deltas: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        known = self._deltas.get(index)
        self._deltas[index] = delta if known is None else _both(known, delta)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._arrived.set()

    async def take(self) -> list[tuple[int, Delta]]:
        await self._arrived.wait()
        if self._error is not None:
            raise self._error
        self._arrived.clear()
        deltas, self._deltas = self._deltas, {}
        return list(deltas.items())


def _both(first: Delta, second: Delta) -> Delta:
    """Two deltas of a request as one."""
    return Delta(
        first.request_id,
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.logprobs + second.logprobs,
        first.prompt_logprobs + second.prompt_logprobs,
        second.finish,
        cached_tokens=second.cached_tokens,
    )
