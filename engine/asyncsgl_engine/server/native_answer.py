"""From what the engine gives to SGLang's form of an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..request import Completion, Delta, Finish, TokenLogprob
from .native_asks import Ask

__all__ = ["Growing", "finish_reason", "result"]

TextOf = Callable[[int], str]


def result(ask: Ask, done: Completion, text_of: TextOf | None) -> dict[str, Any]:
    """A finished answer.

    Args:
        ask: what was asked.
        done: what came.
        text_of: gives a token's text, where the log-probabilities are to have it.
    """
    growing = Growing(ask, text_of, incremental=False)
    growing.add(
        Delta(ask.rid, done.text, done.token_ids, done.logprobs, done.prompt_logprobs, done.finish)
    )
    return growing.chunk()


class Growing:
    """An answer that grows, and the chunks that tell of it.

    Args:
        ask: what was asked.
        text_of: gives a token's text, where the log-probabilities are to have it.
        incremental: a chunk brings what is new, and not all so far.
    """

    def __init__(self, ask: Ask, text_of: TextOf | None, incremental: bool) -> None:
        self._ask = ask
        self._text_of = text_of
        self._incremental = incremental
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt: list[TokenLogprob] = []
        self._tokens = 0
        self._told = 0
        self._cached = 0
        self.finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        """Take what is new."""
        self._tokens += len(delta.token_ids)
        if not self._ask.only_scored:
            self._text += delta.text
            self._ids += delta.token_ids
        self._logprobs += delta.logprobs
        self._prompt += delta.prompt_logprobs
        self._cached = delta.cached_tokens
        self.finish = delta.finish or self.finish

    @property
    def due(self) -> bool:
        """Whether there is enough for a chunk."""
        return self.finish is not None or self._tokens - self._told >= self._ask.stream_interval

    def chunk(self) -> dict[str, Any]:
        """What is there now, in SGLang's form."""
        chunk = {"text": self._text, "output_ids": list(self._ids), "meta_info": self._meta()}
        if self._ask.shows_prompt:
            chunk["prompt_token_ids"] = list(self._ask.request.prompt_ids)
        self._told = self._tokens
        if self._incremental:
            self._text, self._ids, self._logprobs = "", [], []
        return chunk

    def _meta(self) -> dict[str, Any]:
        ask, finish = self._ask, self.finish
        meta: dict[str, Any] = {
            "id": ask.rid,
            "finish_reason": None if finish is None else finish_reason(finish, ask.only_scored),
            "prompt_tokens": len(ask.request.prompt_ids),
            "completion_tokens": 0 if ask.only_scored else self._tokens,
            "cached_tokens": self._cached if finish is None else finish.cached_tokens,
            "reasoning_tokens": 0,
            "num_retractions": 0 if finish is None else finish.retractions,
            "weight_version": "default",
            "dp_rank": None,
        }
        if ask.request.return_logprob:
            meta |= self._scores()
        if finish is not None:
            meta |= _timings(finish)
        return meta

    def _scores(self) -> dict[str, Any]:
        request, text_of = self._ask.request, self._text_of
        prompt, output = self._prompt, self._logprobs
        scores: dict[str, Any] = {
            "input_token_logprobs": [_triple(each, text_of) for each in prompt],
            "output_token_logprobs": [_triple(each, text_of) for each in output],
            "output_token_logprobs_length": len(output),
        }
        if request.top_logprobs_num:
            scores["input_top_logprobs"] = [_triples(each.top, text_of) for each in prompt]
            scores["output_top_logprobs"] = [_triples(each.top, text_of) for each in output]
        if request.token_ids_logprob:
            scores["input_token_ids_logprobs"] = [_triples(each.chosen, text_of) for each in prompt]
            scores["output_token_ids_logprobs"] = [
                _triples(each.chosen, text_of) for each in output
            ]
        return scores


def _triple(entry: TokenLogprob, text_of: TextOf | None) -> list[Any]:
    text = None if text_of is None else text_of(entry.token_id)
    return [entry.logprob, entry.token_id, text]


def _triples(
    entries: Sequence[tuple[int, float]], text_of: TextOf | None
) -> list[list[Any]] | None:
    """Alternatives at a position; null at a prompt's first token, where nothing was predicted."""
    if not entries:
        return None
    return [
        [logprob, token, None if text_of is None else text_of(token)] for token, logprob in entries
    ]


def finish_reason(finish: Finish, only_scored: bool = False) -> dict[str, Any]:
    """SGLang's form of an end."""
    match finish.reason:
        case "stop" if not only_scored:
            return {"type": "stop", "matched": finish.matched}
        case "abort" if finish.completion_tokens == 0:
            return {"type": "abort", "message": "Abort in waiting queue"}
        case "abort":
            message = "Aborted by a request to /abort_request"
            return {"type": "abort", "message": message, "status_code": None, "err_type": None}
        case _:
            return {"type": "length", "length": 0 if only_scored else finish.completion_tokens}


def _timings(finish: Finish) -> dict[str, float | None]:
    decoding = finish.total_s - finish.ttft_s
    return {
        "e2e_latency": finish.total_s,
        "queue_time": finish.queue_s,
        "first_token_latency": finish.ttft_s,
        "decode_throughput": (finish.completion_tokens - 1) / decoding if decoding > 0 else None,
        "response_sent_to_client_ts": time.time(),
    }
