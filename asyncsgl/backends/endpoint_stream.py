"""Puts the chunks of a streamed answer together, whichever way the server cuts them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import BackendError, TruncatedStreamError
from ..types import Delta, GenRequest
from .endpoint_wire import Json, refusal_of, shown_text, token_logprobs

__all__ = ["StreamAssembly"]

_LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")


@dataclass(slots=True)
class _Answer:
    """What has come of one answer."""

    text: str = ""
    ids: list[int] = field(default_factory=list[int])
    meta: Json = field(default_factory=dict[str, Any])
    finished: bool = False


class StreamAssembly:
    """The answers of one streamed request.

    Chunks repeat everything so far, or, if the server was started so, bring only what is new;
    no chunk says which. Where the number of token ids tells, it decides; else a text that
    does not begin with the text so far does.

    Args:
        request: what was asked.
        backend: the backend's name, for errors.
        rid: the id that the server knows the request by.
        cuts: whether the match of a pattern that ends a text is to be cut off here; any text
            may begin one, so with patterns all of it comes at the end.
    """

    def __init__(self, request: GenRequest, *, backend: str, rid: str, cuts: bool = False) -> None:
        self._backend = backend
        self._rid = rid
        self._answers = [_Answer() for _ in range(request.sampling.n or 1)]
        self._params = params = request.sampling
        self._holds = cuts and bool(params.stop_regex)
        self._logprobs = bool(params.return_logprob or params.top_logprobs_num)
        self._incremental = False

    @property
    def finished(self) -> bool:
        """Whether every answer has come to its end."""
        return all(answer.finished for answer in self._answers)

    def add(self, data: bytes) -> Delta:
        """What an event brings that is new.

        Raises:
            BackendError: the event tells of an error, or of an abort.
        """
        try:
            chunk = json.loads(data)
        except ValueError as error:
            shown = data[:200].decode("utf-8", "replace")
            raise self._error(f"an event of the stream is not JSON: {shown!r}") from error
        refused = refusal_of(chunk, backend=self._backend, request_id=self._rid)
        if refused is not None:
            raise refused
        index = chunk.get("index") or 0
        if not 0 <= index < len(self._answers):
            raise self._error(f"the stream has an answer number {index} that was not asked for")
        return self._grow(index, chunk)

    def results(self) -> list[Json]:
        """The whole answers, as an answer that is not streamed has them.

        Raises:
            TruncatedStreamError: the end of an answer is missing.
        """
        if not self.finished:
            raise TruncatedStreamError(
                "the stream ended without its end marker",
                backend=self._backend,
                request_id=self._rid,
            )
        return [
            {"text": answer.text, "output_ids": answer.ids, "meta_info": answer.meta}
            for answer in self._answers
        ]

    def _grow(self, index: int, chunk: Json) -> Delta:
        answer = self._answers[index]
        text, meta = chunk["text"], chunk["meta_info"]
        ids = chunk.get("output_ids") or []
        new = self._only_new(answer, text, ids, meta.get("completion_tokens"))
        piece = text if new else text[len(answer.text) :]
        known = 0 if new else len(answer.meta.get(_LISTS[0], ()))
        logprobs = token_logprobs(meta, "output", known) if self._logprobs else ()
        if new:
            answer.text += text
            answer.ids += ids
        else:
            answer.text, answer.ids = text, ids
        _update(answer.meta, meta, new)
        answer.finished = meta.get("finish_reason") is not None
        if self._holds:
            piece = self._held(answer)
        return Delta(piece, index, logprobs=logprobs)

    def _held(self, answer: _Answer) -> str:
        """What to show of an answer that a pattern may end: nothing before its end."""
        if not answer.finished:
            return ""
        return shown_text(self._params, {"text": answer.text, "meta_info": answer.meta})

    def _only_new(self, answer: _Answer, text: str, ids: list[int], tokens: Any) -> bool:
        """Whether a chunk brings only what is new, and not everything so far."""
        if answer.ids and isinstance(tokens, int):
            repeated = abs(len(ids) - tokens)
            appended = abs(len(answer.ids) + len(ids) - tokens)
            return appended < repeated
        if answer.text and not text.startswith(answer.text):
            self._incremental = True
        return self._incremental

    def _error(self, message: str) -> BackendError:
        return BackendError(message, backend=self._backend, request_id=self._rid)


def _update(meta: Json, chunk: Json, new: bool) -> None:
    """Take a chunk's meta information over; what it says no more stays."""
    for key, value in chunk.items():
        if new and key in _LISTS and value:
            meta[key] = [*meta.get(key, ()), *value]
        elif value or key not in meta:
            meta[key] = value
