"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .errors import EngineError, InvalidRequest
from .images import PlacedImage

__all__ = [
    "MOST_BIAS",
    "Completion",
    "Delta",
    "Finish",
    "Grammar",
    "Request",
    "Sampling",
    "TokenLogprob",
]

MOST_BIAS = 1e6
"""Above any logit, and far from what a temperature could make infinite."""

_SEED_BITS = 64


def _require(ok: bool, field: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(field, f"must be {allowed}, not {value!r}")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn and when a sequence ends.

    Processing order: penalties and `logit_bias`, grammar, temperature, `top_k`, `top_p`,
    `min_p`, as in transformers' logits processors.

    Args:
        max_new_tokens: most tokens to generate; 0 only scores the prompt.
        min_new_tokens: no stop of any kind counts before that many tokens.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: smallest set of tokens whose probabilities reach this share, in (0, 1].
        top_k: the most probable tokens kept; -1 keeps all.
        min_p: tokens below this share of the best token's probability are dropped, in [0, 1].
        frequency_penalty: subtracted once per earlier occurrence in the output, in [-2, 2].
        presence_penalty: subtracted when the token occurred in the output, in [-2, 2].
        repetition_penalty: divides (or multiplies, if negative) the logits of tokens seen in
            the prompt or output, in (0, 2].
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the sequence; their text is not part of it.
        stop_regex: patterns that end the text where their first match begins.
        logit_bias: (token id, bias) pairs added to the logits, bias in [-1e6, 1e6].
        seed: makes the draw repeatable, whatever else runs in the same batch.
        skip_special_tokens: leave special tokens out of the text.
        no_stop_trim: keep what stopped the sequence in the text.

    Raises:
        InvalidRequest: a field is out of its range.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    skip_special_tokens: bool = True
    no_stop_trim: bool = False

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_ranges()
        self._check_stops()

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before change the logits."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0
        )

    def _check_lengths(self) -> None:
        least, most = self.min_new_tokens, self.max_new_tokens
        _require(_is_count(most, 0), "max_new_tokens", "a whole number >= 0", most)
        _require(_is_count(least, 0), "min_new_tokens", "a whole number >= 0", least)
        _require(least <= most, "min_new_tokens", f"at most max_new_tokens ({most})", least)

    def _check_ranges(self) -> None:
        heat = self.temperature
        _require(0.0 <= heat < math.inf, "temperature", "a finite number >= 0", heat)
        _require(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        _require(
            self.top_k == -1 or _is_count(self.top_k, 1), "top_k", "-1 (all) or >= 1", self.top_k
        )
        _require(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]", self.min_p)
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, name, "in [-2, 2]", value)
        _require(
            0.0 < self.repetition_penalty <= 2.0,
            "repetition_penalty",
            "in (0, 2]",
            self.repetition_penalty,
        )
        for token, bias in self.logit_bias:
            _require(_is_count(token, 0), "logit_bias", "keyed by token ids >= 0", token)
            _require(-MOST_BIAS <= bias <= MOST_BIAS, "logit_bias", "biases in [-1e6, 1e6]", bias)
        if self.seed is not None:
            _require(
                _is_count(self.seed, 1 - 2**_SEED_BITS) and self.seed < 2**_SEED_BITS,
                "seed",
                f"a whole number of at most {_SEED_BITS} bits",
                self.seed,
            )

    def _check_stops(self) -> None:
        for name in ("stop", "stop_regex"):
            for item in getattr(self, name):
                _require(isinstance(item, str) and item != "", name, "non-empty strings", item)
        for token in self.stop_token_ids:
            _require(_is_count(token, 0), "stop_token_ids", "token ids >= 0", token)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language the output must belong to.

    Args:
        kind: `regex` (full match), `json_schema` (JSON text) or `ebnf` (Lark or GBNF).
        source: the grammar's text.
    """

    kind: Literal["regex", "json_schema", "ebnf"]
    source: str

    def __post_init__(self) -> None:
        _require(
            self.kind in ("regex", "json_schema", "ebnf"),
            "grammar.kind",
            "regex, json_schema or ebnf",
            self.kind,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue or to score.

    Args:
        request_id: unique among the requests that are in the engine.
        prompt_ids: token ids, at least one.
        sampling: how to draw and when to end.
        grammar: restricts the output.
        stream: deliver text as it grows instead of once at the end.
        return_logprob: give the log-probability of each output token.
        logprob_start_len: -1 for output tokens only; from 0 on, prompt tokens from that
            position are scored too (needs `return_logprob`).
        top_logprobs_num: how many of the most probable tokens to list at each position.
        token_ids_logprob: token ids whose log-probability is listed at each position.
        priority: higher runs first.
        cache_salt: prefixes are shared only among requests of the same salt.
        no_cache: neither read nor fill the prefix cache.
        images: what the model reads instead of the tokens at their positions.

    Raises:
        InvalidRequest: a field is out of its range.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    grammar: Grammar | None = None
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    no_cache: bool = False
    images: tuple[PlacedImage, ...] = ()

    def __post_init__(self) -> None:
        _require(len(self.prompt_ids) > 0, "prompt_ids", "at least one token", ())
        end = max((image.end for image in self.images), default=0)
        _require(end <= len(self.prompt_ids), "images", "placed inside the prompt", end)
        start = self.logprob_start_len
        _require(
            start == -1 or (_is_count(start, 0) and start < len(self.prompt_ids)),
            "logprob_start_len",
            f"-1 or in [0, {len(self.prompt_ids) - 1}] for this prompt",
            start,
        )
        _require(
            _is_count(self.top_logprobs_num, 0),
            "top_logprobs_num",
            "a whole number >= 0",
            self.top_logprobs_num,
        )
        for token in self.token_ids_logprob:
            _require(_is_count(token, 0), "token_ids_logprob", "token ids >= 0", token)
        wants = start >= 0 or self.top_logprobs_num > 0 or bool(self.token_ids_logprob)
        _require(
            self.return_logprob or not wants,
            "return_logprob",
            "true when logprob_start_len, top_logprobs_num or token_ids_logprob is given",
            self.return_logprob,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The model's own log-probabilities at one position, before penalties and temperature.

    Args:
        token_id: the token that stands there.
        logprob: natural logarithm of its probability; None for a prompt's first token.
        top: (token id, logprob) of the most probable tokens, best first.
        chosen: (token id, logprob) of the tokens asked for by `token_ids_logprob`, in order.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    chosen: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """Why and when a sequence ended.

    Args:
        reason: `stop` (end of sequence, stop string, token or pattern, grammar complete),
            `length`, or `abort`.
        matched: the stop string or pattern, or the token id, that ended it.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, a final stop token included.
        cached_tokens: prompt tokens taken from the prefix cache.
        queue_s: seconds from arrival to the first step it was in.
        ttft_s: seconds from arrival to the first token (to the end where there is none).
        total_s: seconds from arrival to the end.
        retractions: times it lost its pages to others and was computed again.
    """

    reason: Literal["stop", "length", "abort"]
    matched: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    retractions: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request; the last one has `finish` or `error`.

    Args:
        request_id: whose it is.
        text: new text, never half a character and never part of a stop string.
        token_ids: new tokens. They may run ahead of the text.
        logprobs: one entry for each new token when asked for.
        prompt_logprobs: entries for prompt positions when asked for.
        finish: set on the last delta of a request that ended well.
        error: set on the last delta of one that did not.
        cached_tokens: prompt tokens taken from the prefix cache.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: EngineError | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: the sum of its deltas."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish: Finish
