"""How to sample one generation: the fields, written once, and what they may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from operator import attrgetter
from typing import TypedDict

from .errors import InvalidArgument

__all__ = ["SAMPLING_FIELDS", "UNSET", "Overrides", "SamplingOverrides", "SamplingParams"]


class SamplingOverrides(TypedDict, total=False):
    """The sampling keywords that ``gen`` and ``run`` take; see :class:`SamplingParams`."""

    max_tokens: int | None
    min_tokens: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    stop_regex: str | Sequence[str] | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    return_logprob: bool | None
    logprob_start_len: int | None
    top_logprobs_num: int | None
    return_text_in_logprobs: bool | None


class Overrides(SamplingOverrides, total=False):
    """:class:`SamplingOverrides` with ``max_new_tokens``, another name of ``max_tokens``."""

    max_new_tokens: int | None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one generation. ``None`` leaves a field to the next default.

    The order of precedence: the ``gen``'s own value, the run's, the backend's.

    Args:
        max_tokens: most tokens to generate, 0 or more (0 only computes the prompt).
        min_tokens: no end of sequence before so many tokens.
        n: how many answers to sample, 1 to 128.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end the text.
        stop_regex: regular expressions that end the text where they match.
        temperature: 0 (greedy) to 2 and above.
        top_p: sample from the smallest set of tokens with this probability, (0, 1].
        top_k: sample from this many most probable tokens; -1 for all.
        min_p: drop tokens less probable than this share of the best, [0, 1].
        frequency_penalty: -2 to 2, for each time that a token was generated.
        presence_penalty: -2 to 2, for tokens that were generated at all.
        repetition_penalty: above 0; over 1 makes repeated tokens less probable.
        ignore_eos: go on after the end-of-sequence token.
        logit_bias: token id to a value added to its logit, -100 to 100.
        seed: makes sampling repeatable.
        return_logprob: give the logprobs of the generated tokens.
        logprob_start_len: also give the prompt's logprobs from this token on; -1 for none.
        top_logprobs_num: for each token, also the best alternatives, 0 or more.
        return_text_in_logprobs: give the tokens' texts with the logprobs.

    Raises:
        InvalidArgument: a value is of the wrong kind or out of its range.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_regex: str | Sequence[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None

    def __post_init__(self) -> None:
        for name, value in zip(SAMPLING_FIELDS, _values(self), strict=True):
            if value is None:
                continue
            bound = _BOUNDS.get(name)
            if bound is not None:
                bound.check(name, value)
            else:
                object.__setattr__(self, name, _checked(name, value))
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise InvalidArgument(
                "min_tokens",
                f"must be at most max_tokens, which is {self.max_tokens}, got {self.min_tokens}",
            )

    def merged(self, over: SamplingParams) -> SamplingParams:
        """These parameters with every field that ``over`` sets taken from it."""
        if over is UNSET:
            return self
        if self is UNSET:
            return over
        return replace(self, **{name: getattr(over, name) for name in over.given()})

    def given(self) -> tuple[str, ...]:
        """The names of the fields that are set."""
        if self is UNSET:
            return ()
        return tuple(compress(SAMPLING_FIELDS, [value is not None for value in _values(self)]))


@dataclass(frozen=True, slots=True)
class _Bound:
    """The kind and range of one numeric field."""

    whole: bool
    low: float
    high: float = math.inf
    open_low: bool = False
    also: float | None = None

    def check(self, field: str, value: object) -> None:
        kinds = (int,) if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "a whole number" if self.whole else "a number"
            raise InvalidArgument(field, f"must be {wanted}, got {value!r}")
        if value == self.also:
            return
        low_ok = value > self.low if self.open_low else value >= self.low
        if not (low_ok and value <= self.high and value != math.inf):
            raise InvalidArgument(field, f"must be {self._words()}, got {value!r}")

    def _words(self) -> str:
        relation = "above" if self.open_low else "at least"
        words = f"{relation} {self.low:g}"
        if self.high != math.inf:
            words += f" and at most {self.high:g}"
        return words + (f", or {self.also:g}" if self.also is not None else "")


_BOUNDS = {
    "max_tokens": _Bound(True, 0),
    "min_tokens": _Bound(True, 0),
    "n": _Bound(True, 1, 128),
    "temperature": _Bound(False, 0),
    "top_p": _Bound(False, 0, 1, open_low=True),
    "top_k": _Bound(True, 1, also=-1),
    "min_p": _Bound(False, 0, 1),
    "frequency_penalty": _Bound(False, -2, 2),
    "presence_penalty": _Bound(False, -2, 2),
    "repetition_penalty": _Bound(False, 0, 2, open_low=True),
    "seed": _Bound(True, -(2**63), 2**63 - 1),
    "logprob_start_len": _Bound(True, 0, also=-1),
    "top_logprobs_num": _Bound(True, 0, 1000),
}
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
_values: Callable[[SamplingParams], tuple[object, ...]] = attrgetter(*SAMPLING_FIELDS)
"""The values of all fields in one go: every generation asks for them several times."""


def _checked(field: str, value: object) -> object:
    """The value of a field that is no number, in the form that is kept."""
    if field == "logit_bias":
        return _checked_bias(value)
    check = _STOPS.get(field)
    if check is not None:
        return tuple(map(check, _as_tuple(field, value)))
    if not isinstance(value, bool):
        raise InvalidArgument(field, f"must be True or False, got {value!r}")
    return value


def _as_tuple(field: str, value: object) -> tuple[object, ...]:
    if isinstance(value, str) and field != "stop_token_ids":
        return (value,)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(value)
    raise InvalidArgument(field, f"must be a sequence, got {value!r}")


def _stop_text(text: object) -> object:
    if not isinstance(text, str) or not text:
        raise InvalidArgument("stop", f"must be non-empty strings, got {text!r}")
    return text


def _stop_regex(pattern: object) -> object:
    if not isinstance(pattern, str) or not pattern:
        raise InvalidArgument("stop_regex", f"must be non-empty strings, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidArgument(
            "stop_regex", f"{pattern!r} is not a regular expression: {error}"
        ) from error
    return pattern


def _stop_token(token: object) -> object:
    _TOKEN_ID.check("stop_token_ids", token)
    return token


_STOPS = {"stop": _stop_text, "stop_regex": _stop_regex, "stop_token_ids": _stop_token}
_TOKEN_ID = _Bound(True, 0)
_BIAS = _Bound(False, -100, 100)
UNSET = SamplingParams()
"""No field set; shared, since most generations and runs set none."""


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise InvalidArgument("logit_bias", f"must map token ids to numbers, got {bias!r}")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        if isinstance(token, str) and token.isdecimal():
            token = int(token)  # JSON has only texts as keys
        _TOKEN_ID.check("logit_bias", token)
        _BIAS.check("logit_bias", value)
        checked[int(token)] = float(value)
    return checked
