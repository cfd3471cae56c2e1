"""Turns one sequence's tokens into text, finds its end, and words both as deltas."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from contextlib import suppress
from typing import Literal, Protocol

import regex

from .errors import InvalidRequest
from .request import Delta, Finish, TokenLogprob
from .sequence import Sequence
from .stops import StopMatcher

__all__ = ["Answer", "Decoder", "TextTokenizer"]

Reason = Literal["stop", "length", "abort"]


class Decoder(Protocol):
    """Token ids to text, bit by bit; never half a character."""

    def push(self, ids: Tokens[int]) -> str:
        """New text that the tokens bring."""
        ...

    def flush(self) -> str:
        """What was held back, at the end."""
        ...


class TextTokenizer(Protocol):
    """What the core needs of a tokenizer."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        ...

    def decode(self, ids: Tokens[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence."""
        ...

    def stream(self, skip_special_tokens: bool = True) -> Decoder:
        """A decoder for a growing sequence."""
        ...


class Answer:
    """What a request has got so far.

    Args:
        sequence: the tokens.
        tokenizer: decodes them.
        patterns: the request's `stop_regex`, compiled.
        arrived: when the request came, in seconds of the core's clock.
    """

    __slots__ = (
        "_arrived",
        "_decoder",
        "_ended",
        "_first",
        "_logprobs",
        "_matched",
        "_matcher",
        "_prompt_logprobs",
        "_sent",
        "_started",
        "_stop_ids",
        "_text",
        "_tokenizer",
        "_whole",
        "sequence",
        "taken",
    )

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: TextTokenizer,
        patterns: Tokens[regex.Pattern[str]],
        arrived: float,
    ) -> None:
        sampling = sequence.request.sampling
        self.sequence = sequence
        self.taken = 0
        """Tokens of the output that it was given."""
        self._tokenizer = tokenizer
        self._arrived = arrived
        self._started: float | None = None
        self._first: float | None = None
        self._ended: Reason | None = None
        self._matched: str | int | None = None
        ends = frozenset() if sampling.ignore_eos else tokenizer.eos_token_ids
        self._stop_ids = ends.union(sampling.stop_token_ids)
        # Text is needed on the way only to be shown or searched.
        self._whole = not (sequence.request.stream or sampling.stop or patterns)
        self._decoder = tokenizer.stream(sampling.skip_special_tokens)
        self._matcher = StopMatcher(sampling.stop, patterns, sampling.no_stop_trim)
        self._text: list[str] = []
        self._sent = 0
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        request = sequence.request
        if request.return_logprob and request.logprob_start_len == 0:
            self._prompt_logprobs.append(TokenLogprob(sequence.request.prompt_ids[0], None))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end the sequence."""
        return tuple(self._stop_ids)

    @property
    def ended(self) -> bool:
        """Whether its end was found."""
        return self._ended is not None

    def start(self, now: float) -> None:
        """The sequence is in a step for the first time, or again."""
        if self._started is None:
            self._started = now

    def score(self, entries: Tokens[TokenLogprob]) -> None:
        """Take log-probabilities of prompt tokens."""
        self._prompt_logprobs.extend(entries)

    def take(self, token: int, logprob: TokenLogprob | None, now: float) -> None:
        """Take the next of the sequence's tokens, which has it already."""
        self.taken += 1
        if self._first is None:
            self._first = now
        if logprob is not None:
            self._logprobs.append(logprob)
        sampling = self.sequence.request.sampling
        count = self.taken
        armed = count >= sampling.min_new_tokens
        if armed and token in self._stop_ids:
            self.end("stop", token)
            if sampling.no_stop_trim and not self._whole:
                self._text.append(self._matcher.push(self._decoder.push((token,)), armed=False))
            return
        if not self._whole:
            shown = self._matcher.push(self._decoder.push((token,)), armed)
            if shown:
                self._text.append(shown)
            if self._matcher.matched is not None:
                self.end("stop", self._matcher.matched)
                return
        if count >= self.sequence.max_new_tokens:
            self.end("length")

    def end(self, reason: Reason, matched: str | int | None = None) -> None:
        """Note the end, once."""
        if self._ended is None:
            self._ended, self._matched = reason, matched

    def delta(self, now: float) -> Delta | None:
        """What came since the last delta; None when that is nothing or is to be kept back."""
        if self._ended is None and not self.sequence.request.stream:
            return None
        if self._ended is not None:
            self._finish_text()
        sequence = self.sequence
        text = "".join(self._text)
        tokens = tuple(self._tokens()[self._sent :])
        logprobs, scores = tuple(self._logprobs), tuple(self._prompt_logprobs)
        if not (tokens or text or scores or self._ended):
            return None
        self._sent += len(tokens)
        self._text, self._logprobs, self._prompt_logprobs = [], [], []
        finish = None if self._ended is None else self._finish(self._ended, now)
        name, cached = sequence.request.request_id, max(sequence.cached_tokens, 0)
        return Delta(name, text, tokens, logprobs, scores, finish, cached_tokens=cached)

    def _tokens(self) -> Tokens[int]:
        start = self.sequence.prompt_tokens
        return self.sequence.tokens[start : start + self.taken]

    def _finish_text(self) -> None:
        if self._whole:
            sampling = self.sequence.request.sampling
            tokens = self._tokens()
            if isinstance(self._matched, int) and not sampling.no_stop_trim:
                tokens = tokens[:-1]
            self._text = [self._tokenizer.decode(tokens, sampling.skip_special_tokens)]
        elif self._matcher.matched is None:
            # What a half character leaves at the end may complete a stop string too.
            tail = self._decoder.flush()
            armed = self.taken >= self.sequence.request.sampling.min_new_tokens
            with suppress(InvalidRequest):  # the end is there, whatever a pattern takes
                self._text.append(self._matcher.push(tail, armed))
            self._text.append(self._matcher.flush())

    def _finish(self, reason: Reason, now: float) -> Finish:
        sequence = self.sequence
        started = now if self._started is None else self._started
        first = now if self._first is None else self._first
        return Finish(
            reason=reason,
            matched=self._matched,
            prompt_tokens=sequence.prompt_tokens,
            completion_tokens=self.taken,
            cached_tokens=max(sequence.cached_tokens, 0),
            queue_s=started - self._arrived,
            ttft_s=first - self._arrived,
            total_s=now - self._arrived,
            retractions=sequence.retractions,
        )
