"""From the body of `/generate` to requests of the engine."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..images import Prompt
from ..request import MOST_BIAS, Grammar, Request, Sampling
from .failures import Failure
from .native_body import GenerateBody, SamplingBody

__all__ = ["Ask", "Asks", "asks_of", "grammar_of", "sampling_of", "token_ids_of"]

T = TypeVar("T")

_GREEDY_BELOW = 1e-6
_REGEX_BYTES = 256
_GRAMMARS = ("regex", "json_schema", "ebnf", "choice")
# Known to SGLang's servers, and with an effect on the answer that is not to be had here.
_REFUSED = (
    "input_embeds",
    "video_data",
    "audio_data",
    "session_params",
    "lora_path",
    "custom_logit_processor",
    "return_hidden_states",
    "return_routed_experts",
    "return_indexer_topk",
    "return_entropy",
    "return_bytes",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "return_flat_raw_top_logprobs",
    "return_flat_raw_output_top_logprobs",
    "return_flat_raw_top_logprobs_b64",
    "max_thinking_tokens",
    "watermark",
    "bootstrap_host",
)
_REFUSED_SAMPLING = ("structural_tag", "custom_params", "watermark")


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence.

    Args:
        rid: what the client calls it.
        request: what the engine is asked for.
        only_scored: no token was wanted; the one that is drawn for its log-probabilities is
            not shown.
        stream_interval: tokens a chunk brings at least.
        shows_prompt: whether the answer repeats the prompt's token ids.
    """

    rid: str
    request: Request
    only_scored: bool
    stream_interval: int
    shows_prompt: bool


@dataclass(frozen=True, slots=True)
class Asks:
    """All sequences of one body.

    Args:
        asks: prompt by prompt, and sample by sample for each.
        is_list: whether the answer is a list.
    """

    asks: tuple[Ask, ...]
    is_list: bool


def asks_of(
    body: GenerateBody, prompts: Sequence[Prompt], is_list: bool, context_length: int
) -> Asks:
    """What a body asks for.

    Args:
        body: checked for its shape.
        prompts: at least one.
        is_list: whether they came as a list.
        context_length: tokens of a sequence at most.

    Raises:
        Failure: fields contradict each other or ask for what is not there.
        InvalidRequest: a value is out of its range.
    """
    count = len(prompts)
    params = _each(body.sampling_params, count, is_list, "sampling_params", SamplingBody())
    samples = {each.n or 1 for each in params}
    if len(samples) > 1:
        raise Failure(400, "all prompts of a batch must have the same n", "n")
    n = samples.pop()
    if n > 1 and any(isinstance(getattr(body, name), list) for name in _PER_PROMPT_LOGPROBS):
        raise Failure(400, "lists of logprob settings do not go with n > 1", "n")
    rids = _rids(body.rid, count, n, is_list)
    asks = []
    for index, prompt in enumerate(prompts):
        values = _Values.of(body, index, count, is_list, len(prompt.ids))
        for sample in range(n):
            rid = rids[index * n + sample]
            asks.append(_ask(rid, prompt, params[index], values, sample, body, context_length))
    return Asks(tuple(asks), is_list or n > 1)


_PER_PROMPT_LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num")


def _refuse(body: GenerateBody) -> None:
    extra = body.model_extra or {}
    for name in _REFUSED:
        if extra.get(name) not in (None, False, [], {}, ""):
            raise Failure(400, f"{name} is not supported by this server; leave it out", name)


def token_ids_of(
    body: GenerateBody, encode: Callable[[str], Sequence[int]]
) -> tuple[list[Sequence[int]], bool]:
    """Token ids of every prompt, and whether they came as a list.

    Args:
        body: checked for its shape.
        encode: text to token ids.

    Raises:
        Failure: there is no prompt, or fields ask for what is not there.
    """
    _refuse(body)
    text, ids = body.text, body.input_ids
    if text is None and ids is None:
        raise Failure(400, "one of text and input_ids is needed", "text")
    if ids is not None:
        nested = [each for each in ids if isinstance(each, list)]
        given: list[Sequence[int]] = (
            list(nested) if nested else [[each for each in ids if isinstance(each, int)]]
        )
        is_list = bool(nested)
        if text is not None and isinstance(text, list) != is_list:
            raise Failure(400, "text and input_ids differ in shape; send one of them", "input_ids")
    else:
        assert text is not None
        texts, is_list = (text, True) if isinstance(text, list) else ([text], False)
        given = [encode(each) if each else () for each in texts]
    if not given or not all(given):
        raise Failure(400, "a prompt is empty; it needs at least one token", "text")
    if isinstance(text, list) and len(text) != len(given):
        raise Failure(400, "text and input_ids differ in length; send one of them", "input_ids")
    return given, is_list


def _each(value: T | list[T] | None, count: int, is_list: bool, name: str, default: T) -> list[T]:
    """A value for every prompt: one of a list each, or the same for all."""
    if not isinstance(value, list):
        return [default if value is None else value] * count
    if not is_list:
        raise Failure(400, f"{name} is a list, but there is one prompt, not a list of them", name)
    if len(value) != count:
        raise Failure(400, f"{name} has {len(value)} entries for {count} prompts", name)
    return value


def _rids(given: str | list[str] | None, count: int, n: int, is_list: bool) -> list[str]:
    if given is None:
        return [uuid.uuid4().hex for _ in range(count * n)]
    if isinstance(given, str):
        names = [f"{given}_{index}" for index in range(count)] if is_list else [given]
    else:
        names = _each(given, count, is_list, "rid", "")
    if not all(names) or len(set(names)) != len(names):
        raise Failure(400, "rid: ids must be different from one another and not empty", "rid")
    return names if n == 1 else [f"{name}_{sample}" for name in names for sample in range(n)]


@dataclass(frozen=True, slots=True)
class _Values:
    """What may differ from prompt to prompt besides its sampling parameters."""

    return_logprob: bool
    start: int
    top: int
    token_ids: tuple[int, ...]
    salt: str | None

    @classmethod
    def of(cls, body: GenerateBody, index: int, count: int, is_list: bool, length: int) -> _Values:
        wanted = _each(body.return_logprob, count, is_list, "return_logprob", False)[index]
        start = _each(body.logprob_start_len, count, is_list, "logprob_start_len", -1)[index]
        top = _each(body.top_logprobs_num, count, is_list, "top_logprobs_num", 0)[index]
        if wanted and not -1 <= start <= length:  # without log-probabilities it says nothing
            problem = f"logprob_start_len: must be -1 or in [0, {length}] for this prompt"
            raise Failure(400, f"{problem}, not {start}", "logprob_start_len")
        if not wanted:
            return cls(False, -1, 0, (), _salt(body, index, count, is_list))
        return cls(
            True,
            -1 if start == length else start,
            top,
            _token_ids(body.token_ids_logprob, index, count, is_list),
            _salt(body, index, count, is_list),
        )


def _token_ids(value: Any, index: int, count: int, is_list: bool) -> tuple[int, ...]:
    if value is None:
        return ()
    if value and all(isinstance(each, int) for each in value):
        return tuple(value)
    given = _each(value, count, is_list, "token_ids_logprob", None)[index]
    return tuple(given or ())


def _salt(body: GenerateBody, index: int, count: int, is_list: bool) -> str | None:
    parts = [
        _each(body.extra_key, count, is_list, "extra_key", "")[index],
        _each(body.cache_salt, count, is_list, "cache_salt", "")[index],
    ]
    return "\0".join(parts) if any(parts) else None


def _ask(
    rid: str,
    prompt: Prompt,
    params: SamplingBody,
    values: _Values,
    sample: int,
    body: GenerateBody,
    context_length: int,
) -> Ask:
    limit = context_length if params.max_new_tokens is None else params.max_new_tokens
    only_scored = limit == 0 and values.return_logprob
    request = Request(
        rid,
        prompt.ids,
        sampling_of(params, max(limit, 1) if only_scored else limit, sample),
        grammar_of(params),
        stream=body.stream,
        return_logprob=values.return_logprob,
        logprob_start_len=values.start,
        top_logprobs_num=values.top,
        token_ids_logprob=values.token_ids,
        priority=body.priority or 0,
        cache_salt=values.salt,
        images=prompt.images,
    )
    return Ask(rid, request, only_scored, params.stream_interval or 1, body.return_prompt_token_ids)


def sampling_of(params: SamplingBody, limit: int, sample: int) -> Sampling:
    """The engine's form of sampling parameters.

    Args:
        params: as sent.
        limit: most tokens to generate.
        sample: which of `n` samples; each has a seed of its own.

    Raises:
        Failure: they ask for what is not there.
        InvalidRequest: a value is out of its range.
    """
    for name in _REFUSED_SAMPLING:
        if getattr(params, name):
            raise Failure(400, f"{name} is not supported by this server; leave it out", name)
    if params.beam_width is not None and params.beam_width > 1:
        raise Failure(400, "beam_width: beam search is not supported by this server", "beam_width")
    heat = _or(params.temperature, 1.0)
    seed = params.sampling_seed
    return Sampling(
        max_new_tokens=limit,
        min_new_tokens=_or(params.min_new_tokens, 0),
        temperature=0.0 if 0.0 <= heat < _GREEDY_BELOW else heat,
        top_p=_or(params.top_p, 1.0),
        top_k=_or(params.top_k, -1),
        min_p=_or(params.min_p, 0.0),
        frequency_penalty=_or(params.frequency_penalty, 0.0),
        presence_penalty=_or(params.presence_penalty, 0.0),
        repetition_penalty=_or(params.repetition_penalty, 1.0),
        ignore_eos=bool(params.ignore_eos),
        stop=_texts(params.stop),
        stop_token_ids=tuple(token for token in params.stop_token_ids or () if token is not None),
        stop_regex=_patterns(params.stop_regex),
        logit_bias=_biases(params.logit_bias),
        seed=None if seed is None else seed + sample,
        skip_special_tokens=_or(params.skip_special_tokens, True),
        no_stop_trim=bool(params.no_stop_trim),
    )


def grammar_of(params: SamplingBody) -> Grammar | None:
    """The grammar that sampling parameters bring; an empty one is none.

    Raises:
        Failure: there is more than one.
    """
    given = [name for name in _GRAMMARS if getattr(params, name)]
    if len(given) > 1:
        raise Failure(400, f"{' and '.join(given)}: at most one of them can hold", given[1])
    if not given:
        return None
    if params.choice:
        return Grammar("regex", "|".join(f"({re.escape(each)})" for each in params.choice))
    if params.regex:
        return Grammar("regex", params.regex)
    if params.json_schema:
        return Grammar("json_schema", params.json_schema)
    return Grammar("ebnf", params.ebnf or "")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _texts(value: str | list[str] | None) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    return tuple(text for text in texts if text)


def _patterns(value: str | list[str] | None) -> tuple[str, ...]:
    patterns = _texts(value)
    for pattern in patterns:
        if len(pattern.encode(errors="surrogatepass")) > _REGEX_BYTES:
            problem = f"stop_regex: a pattern may have {_REGEX_BYTES} bytes at most"
            raise Failure(400, problem, "stop_regex")
    return patterns


def _biases(value: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    biases = []
    for token, bias in (value or {}).items():
        if not (token.isascii() and token.isdigit()):
            raise Failure(400, f"logit_bias: {token!r} is not a token id", "logit_bias")
        # no logit comes near the bound: what lies beyond it acts as if it lay there
        biases.append((int(token), max(-MOST_BIAS, min(bias, MOST_BIAS))))
    return tuple(biases)
