"""Runs batches one after another, their requests side by side, and goes on after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from itertools import islice
from typing import Any

from pydantic import ValidationError

from ..errors import Closed, Overloaded
from .batch_store import BatchStore, Outcome
from .failures import failure_of, shape_failure

__all__ = ["ENDPOINTS", "Answer", "BatchRunner", "new_batch"]

logger = logging.getLogger("asyncsgl_engine.server")

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
FINAL = frozenset(("failed", "completed", "expired", "cancelled"))
WINDOW_S = 24 * 3600
MOST_LINES = 50_000
_READ_AHEAD = 64
_BACK_OFF_S = 1.0

Answer = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


def new_batch(endpoint: str, file: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    """A batch that was just asked for, in OpenAI's form."""
    now = int(time.time())
    stamps = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
    return {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": file,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + WINDOW_S,
        **{f"{stamp}_at": None for stamp in (*stamps, "cancelled")},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": metadata,
    }


class BatchRunner:
    """The batches of a store, in order of arrival.

    Args:
        store: open.
        answer: answers the body of a request to an endpoint.
        concurrency: requests that run at once.
    """

    def __init__(self, store: BatchStore, answer: Answer, concurrency: int) -> None:
        self._store = store
        self._answer = answer
        self._concurrency = concurrency
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._batches: dict[str, dict[str, Any]] = {}
        self._work: tuple[str, asyncio.Task[None]] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Run batches inside the block, those that an earlier server left first."""
        left = await asyncio.to_thread(self._store.all, "batches")
        for batch in reversed(left):
            if batch["status"] not in FINAL:
                self._take(batch)
        task = asyncio.ensure_future(self._run_all())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def add(self, batch: dict[str, Any]) -> None:
        """Take a new batch."""
        await asyncio.to_thread(self._store.put, "batches", batch)
        self._take(batch)

    def _take(self, batch: dict[str, Any]) -> None:
        self._batches[batch["id"]] = batch
        self._queue.put_nowait(batch["id"])

    async def get(self, name: str) -> dict[str, Any] | None:
        """A batch by its id, as it is now."""
        known = self._batches.get(name)
        return known or await asyncio.to_thread(self._store.get, "batches", name)

    async def cancel(self, batch: dict[str, Any]) -> None:
        """Stop a batch; what is answered is kept."""
        if batch["status"] not in FINAL:
            await self._enter(batch, "cancelling")
            if self._work is not None and self._work[0] == batch["id"]:
                self._work[1].cancel()

    # -- one batch ------------------------------------------------------------------------------

    async def _run_all(self) -> None:
        while True:
            batch = self._batches[await self._queue.get()]
            task = asyncio.ensure_future(self._run(batch))
            self._work = batch["id"], task
            try:
                await asyncio.wait([task])
            finally:
                self._work = None
                task.cancel()
                await asyncio.wait([task])
            if batch["status"] == "cancelling":
                await self._finish(batch, "cancelled")
            elif not task.cancelled() and (error := task.exception()) is not None:
                if isinstance(error, Closed):
                    return  # the next server goes on
                logger.error("batch %s failed", batch["id"], exc_info=error)
                await self._fail(batch, [_fault("server_error", str(error), None)])
            if batch["status"] in FINAL:
                del self._batches[batch["id"]]

    async def _run(self, batch: dict[str, Any]) -> None:
        if batch["status"] == "cancelling":
            return
        if batch["status"] == "validating":
            total, faults = await asyncio.to_thread(self._validate, batch)
            if faults:
                await self._fail(batch, faults)
                return
            batch["request_counts"]["total"] = total
            await self._enter(batch, "in_progress")
        done = await asyncio.to_thread(self._store.done, batch["id"])
        counts = batch["request_counts"]
        counts["completed"], counts["failed"] = len(done["output"]), len(done["error"])
        known = done["output"] | done["error"]
        try:
            async with asyncio.timeout(batch["expires_at"] - time.time()):
                await self._answer_all(batch, known)
        except TimeoutError:
            await self._expire(batch)
            await self._finish(batch, "expired")
        else:
            await self._enter(batch, "finalizing")
            await self._finish(batch, "completed")

    async def _answer_all(self, batch: dict[str, Any], known: set[str]) -> None:
        lines = _Lines(self._store.lines(batch["input_file_id"]), known)
        workers = [
            asyncio.ensure_future(self._answer_lines(batch, lines))
            for _ in range(self._concurrency)
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)

    async def _answer_lines(self, batch: dict[str, Any], lines: _Lines) -> None:
        while (ask := await lines.next()) is not None:
            status, body = await self._answered(batch["endpoint"], ask["body"])
            response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
            await self._note(batch, ask["custom_id"], response, None)

    async def _answered(self, endpoint: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        while True:
            try:
                return 200, await self._answer(endpoint, body)
            except Overloaded:
                await asyncio.sleep(_BACK_OFF_S)  # those who wait for an answer go first
            except Closed:
                raise
            except ValidationError as error:
                failure = shape_failure(error.errors())
                return failure.status, failure.body()
            except Exception as error:  # noqa: BLE001 - it is that request's result
                failure = failure_of(error)
                return failure.status, failure.body()

    async def _note(
        self,
        batch: dict[str, Any],
        name: str,
        response: dict[str, Any] | None,
        error: dict[str, Any] | None,
    ) -> None:
        good = response is not None and response["status_code"] == 200
        result = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": name,
            "response": response,
            "error": error,
        }
        outcome: Outcome = "output" if good else "error"
        append = asyncio.to_thread(self._store.append, batch["id"], outcome, result)
        write = asyncio.ensure_future(append)
        try:
            await asyncio.shield(write)
        finally:
            await asyncio.wait([write])  # a thread cannot be stopped: what it wrote counts
        batch["request_counts"]["completed" if good else "failed"] += 1

    async def _expire(self, batch: dict[str, Any]) -> None:
        done = await asyncio.to_thread(self._store.done, batch["id"])
        lines = _Lines(self._store.lines(batch["input_file_id"]), done["output"] | done["error"])
        error = {"code": "batch_expired", "message": "the batch was not done in its window"}
        while (ask := await lines.next()) is not None:
            await self._note(batch, ask["custom_id"], None, error)

    async def _finish(self, batch: dict[str, Any], status: str) -> None:
        name = batch["id"]
        batch["output_file_id"] = await asyncio.to_thread(self._store.finish, name, "output")
        batch["error_file_id"] = await asyncio.to_thread(self._store.finish, name, "error")
        await self._enter(batch, status)

    async def _fail(self, batch: dict[str, Any], faults: list[dict[str, Any]]) -> None:
        batch["errors"] = {"object": "list", "data": faults}
        await self._enter(batch, "failed")

    async def _enter(self, batch: dict[str, Any], status: str) -> None:
        batch["status"] = status
        batch[f"{status}_at"] = int(time.time())
        await asyncio.to_thread(self._store.put, "batches", dict(batch))

    def _validate(self, batch: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """How many requests there are, and what is wrong with the first few bad lines."""
        names: set[str] = set()
        faults: list[dict[str, Any]] = []
        count = 0
        for number, line in self._store.lines(batch["input_file_id"]):
            count += 1
            problem = _problem(line, batch["endpoint"], names)
            if problem is not None:
                faults.append(_fault("invalid_request", problem, number))
            if len(faults) >= 20 or count > MOST_LINES:
                break
        if count > MOST_LINES:
            faults.append(_fault("too_many_requests", f"at most {MOST_LINES} lines", None))
        if not count:
            faults.append(_fault("empty_file", "the file has no requests", None))
        return count, faults


class _Lines:
    """The requests of a file that have no result yet, read ahead in a thread."""

    def __init__(self, lines: Iterator[tuple[int, str]], known: set[str]) -> None:
        self._lines = lines
        self._known = known
        self._ahead: list[dict[str, Any]] = []
        self._reading = asyncio.Lock()
        self._ended = False

    async def next(self) -> dict[str, Any] | None:
        async with self._reading:
            while not self._ahead and not self._ended:
                self._ahead = await asyncio.to_thread(self._read)
            return self._ahead.pop() if self._ahead else None

    def _read(self) -> list[dict[str, Any]]:
        asks = [json.loads(line) for _, line in islice(self._lines, _READ_AHEAD)]
        self._ended = not asks
        return [ask for ask in reversed(asks) if ask["custom_id"] not in self._known]


def _problem(line: str, endpoint: str, names: set[str]) -> str | None:
    try:
        ask = json.loads(line)
        json.dumps(ask, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(ask, dict):
        return "not an object"
    name = ask.get("custom_id")
    if not isinstance(name, str) or not name:
        return "custom_id: a text is needed"
    if name in names:
        return f"custom_id: {name!r} was there before"
    names.add(name)
    if ask.get("method") != "POST":
        return "method: must be POST"
    if ask.get("url") != endpoint:
        return f"url: must be {endpoint}, the batch's endpoint"
    if not isinstance(ask.get("body"), dict):
        return "body: an object is needed"
    return None


def _fault(code: str, message: str, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": line}
