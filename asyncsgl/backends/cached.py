"""Answers kept on disk: the same request is paid for once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import AsyncSGLError, ClosedError, InvalidArgument
from ..types import (
    ChoiceScore,
    Completion,
    Delta,
    Generation,
    GenRequest,
    Scores,
    TokenLogprob,
    Usage,
)
from .base import Backend
from .passing import PassingBackend
from .shared_stream import SharedStream

__all__ = ["CachedBackend", "cached"]

Place = tuple[asyncio.AbstractEventLoop, str]
"""Where a request is under way: the loop, and what names the request."""

_FORMAT = "1"
_SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"


def cached(backend: Backend, path: str | Path) -> CachedBackend:
    """A backend that keeps the answers of ``backend`` in a file.

    Args:
        backend: answers what is not there; closing the result closes it.
        path: of a SQLite file, made if it is not there; several processes may share it.

    Raises:
        InvalidArgument: the file cannot be used.
    """
    return CachedBackend(backend, path)


class CachedBackend(PassingBackend):
    """Gives kept answers; equal requests that come together are asked once.

    The key is everything that changes the answer: the backend and its model, messages with
    their media, sampling, constraint and prompt text. Requests that sample without a seed are
    kept, too: the same request gives the same answer again. Errors are not kept. A kept
    answer has a usage of nothing.
    """

    def __init__(self, backend: Backend, path: str | Path) -> None:
        super().__init__(backend)
        self.path = Path(path)
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._under_way: dict[Place, asyncio.Future[None]] = {}
        self._streams: dict[Place, SharedStream[Delta]] = {}
        self._hits = 0
        self._misses = 0
        self._closed = False

    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request, from the file if it is there; see :meth:`Backend.generate`."""

        async def ask() -> dict[str, Any]:
            return asdict(await self.backend.generate(request))

        found, kept = await self._answer(self._key("generate", request), ask)
        return _generation(found, kept=kept)

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; a kept answer comes in one piece.

        Requests that come while an equal one streams follow that stream.
        """
        key = self._key("generate", request)
        place = asyncio.get_running_loop(), key
        while (found := await asyncio.to_thread(self._read, key)) is None:
            leads = place not in self._under_way
            if leads:
                self._misses += 1
                self._streams[place] = shared = SharedStream(self._kept_stream(request, key))
                self._under_way[place] = shared.ended
                shared.ended.add_done_callback(lambda _: self._has_ended(place))
            elif place not in self._streams:
                await asyncio.wait([self._under_way[place]])
                continue
            begun = False
            try:
                async with aclosing(self._streams[place].read()) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta if leads else _followed(delta)
            except AsyncSGLError:
                if leads or begun:
                    raise
            else:
                return
        self._hits += 1
        generation = _generation(found, kept=True)
        for index, completion in enumerate(generation.completions):
            yield Delta(
                completion.text, index, completion.reasoning or "", completion.logprobs or ()
            )
        yield Delta(generation=generation)

    async def _kept_stream(self, request: GenRequest, key: str) -> AsyncGenerator[Delta, None]:
        async with aclosing(self.backend.stream(request)) as deltas:
            async for delta in deltas:
                if delta.generation is not None:
                    await asyncio.to_thread(self._write, key, asdict(delta.generation))
                yield delta

    def _has_ended(self, place: Place) -> None:
        del self._under_way[place]
        self._streams.pop(place, None)

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score choices, from the file if they are there; see :meth:`Backend.score`."""

        async def ask() -> dict[str, Any]:
            scores = await self.backend.score(request, choices, unconditional=unconditional)
            return asdict(scores)

        key = self._key("score", request, *choices, str(unconditional))
        found, kept = await self._answer(key, ask)
        return Scores(
            tuple(
                ChoiceScore(
                    one["text"],
                    tuple(one["token_ids"]),
                    tuple(one["logprobs"]),
                    None if one["unconditional"] is None else tuple(one["unconditional"]),
                )
                for one in found["choices"]
            ),
            found["decision"],
            Usage() if kept else Usage(**found["usage"]),
            tuple(found["emulated"]),
        )

    def statistics(self) -> Mapping[str, float]:
        """Those of the backend, with ``cache_hits`` and ``cache_misses``."""
        return {
            **self.backend.statistics(),
            "cache_hits": self._hits,
            "cache_misses": self._misses,
        }

    async def aclose(self) -> None:
        """Close the file and the backend; closing twice is fine."""
        self._closed = True
        await asyncio.to_thread(self._close)
        await super().aclose()

    def __repr__(self) -> str:
        return f"<cached {self.backend!r} in {str(self.path)!r}>"

    def _key(self, kind: str, request: GenRequest, *more: str) -> str:
        """What names the request: everything but its number."""
        digest = hashlib.sha256()
        place = [_FORMAT, kind, self.backend.identity, *more]
        digest.update(json.dumps(place).encode())
        for message in request.messages:
            parts = [part if isinstance(part, str) else asdict(part) for part in message.parts]
            digest.update(json.dumps([message.role, parts], default=_digest).encode())
        rest = [
            asdict(request.sampling),
            None if request.constraint is None else asdict(request.constraint),
            request.text,
            request.continue_assistant,
        ]
        digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()

    async def _answer(
        self, key: str, ask: Callable[[], Awaitable[dict[str, Any]]]
    ) -> tuple[dict[str, Any], bool]:
        """The answer, and whether it was there or asked for by another call."""
        place = asyncio.get_running_loop(), key
        while True:
            found = await asyncio.to_thread(self._read, key)
            if found is not None:
                self._hits += 1
                return found, True
            ahead = self._under_way.get(place)
            if ahead is None:
                break
            await asyncio.wait([ahead])
        done = self._under_way[place] = place[0].create_future()
        try:
            self._misses += 1
            answer = await ask()
            await asyncio.to_thread(self._write, key, answer)
            return answer, False
        finally:
            self._has_ended(place)
            done.set_result(None)

    # -- the file; runs in threads -------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise ClosedError("this cache is closed: make a new one")
        if self._database is None:
            try:
                self._database = sqlite3.connect(
                    self.path, timeout=30, isolation_level=None, check_same_thread=False
                )
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=NORMAL")
                self._database.execute(_SCHEMA)
            except sqlite3.Error as error:
                raise InvalidArgument("path", f"cannot use {self.path}: {error}") from error
        return self._database

    def _read(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            row = self._open().execute("SELECT answer FROM answers WHERE key = ?", (key,))
            found = row.fetchone()
        return None if found is None else json.loads(found[0])

    def _write(self, key: str, answer: dict[str, Any]) -> None:
        text = json.dumps(answer, ensure_ascii=False)
        with self._lock:
            self._open().execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def _close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None


def _digest(data: object) -> str:
    assert isinstance(data, bytes)
    return hashlib.sha256(data).hexdigest()


def _generation(found: Mapping[str, Any], *, kept: bool) -> Generation:
    completions = tuple(
        Completion(
            **{
                **one,
                "token_ids": tuple(one["token_ids"]),
                "logprobs": _logprobs(one["logprobs"]),
                "prompt_logprobs": _logprobs(one["prompt_logprobs"]),
            }
        )
        for one in found["completions"]
    )
    generation = Generation(
        completions,
        Usage(**found["usage"]),
        found["request_id"],
        found["model"],
        emulated=tuple(found["emulated"]),
    )
    return _as_kept(generation) if kept else generation


def _as_kept(generation: Generation) -> Generation:
    """The same answer for who has not paid for it."""
    return replace(generation, usage=Usage(), emulated=(*generation.emulated, "cached answer"))


def _followed(delta: Delta) -> Delta:
    if delta.generation is None:
        return delta
    return replace(delta, generation=_as_kept(delta.generation))


def _logprobs(found: Sequence[Mapping[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
    if found is None:
        return None
    return tuple(
        TokenLogprob(
            one["token_id"],
            one["logprob"],
            one["text"],
            tuple((top[0], top[1], top[2]) for top in one["top"]),
        )
        for one in found
    )
