"""From bodies of OpenAI's routes to requests of the engine."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from ..images import Prompt
from ..request import Grammar, Request
from .chat import count_images, render
from .failures import Failure
from .native_asks import grammar_of, sampling_of
from .native_body import SamplingBody
from .openai_body import ChatBody, CompletionBody, SharedBody
from .service import Service

__all__ = ["Asked", "chat_asked", "completion_asked"]

_IDS = "send the text to /generate, whose answers have output_ids"
_FORMAT = "send response_format, regex or ebnf"
_REFUSED = {
    "audio": "",
    "beam_width": "",
    "custom_logit_processor": "",
    "custom_params": "",
    "functions": "",
    "guided_choice": "send regex",
    "guided_grammar": "send ebnf",
    "guided_json": _FORMAT,
    "guided_regex": "send regex",
    "include_stop_str_in_output": "send no_stop_trim",
    "input_embeds": "",
    "input_ids": "send them to /v1/completions as prompt, or to /generate",
    "lora_path": "",
    "max_thinking_tokens": "",
    "prediction": "",
    "prompt_logprobs": "send logprob_start_len to /generate",
    "return_flat_raw_output_top_logprobs": "",
    "return_hidden_states": "",
    "return_input_ids_in_sglext": _IDS,
    "return_meta_info": "send the text to /generate, whose answers have it",
    "return_output_ids_in_sglext": _IDS,
    "return_prompt_token_ids": "send the text to /generate, which has it",
    "return_routed_experts": "",
    "return_sampling_mask": "",
    "return_token_ids": _IDS,
    "session_params": "",
    "structured_outputs": _FORMAT,
    "suffix": "",
    "tools": "",
    "use_beam_search": "",
    "watermark": "",
    "web_search_options": "",
}
"""Known to this kind of route elsewhere, with an effect on the answer that is not to be had here.

Each with what to do instead.
"""
_BIAS = 100.0
"""What OpenAI's `logit_bias` may have at most, either way."""
_COMPLETION_TOKENS = 16
_ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Asked:
    """What one body asks the engine for.

    Args:
        name: the answer's id.
        requests: prompt by prompt, and sample by sample for each.
        n: samples of each prompt.
        streams: whether the answer is a stream.
        usage: whether the stream tells the usage at its end, and with each chunk.
        echo: the prompts' texts, where they are repeated before the answers.
        group: a name for all requests, for `/abort_request`.
    """

    name: str
    requests: tuple[Request, ...]
    n: int
    streams: bool
    usage: tuple[bool, bool]
    echo: tuple[str, ...]
    group: str | None


async def chat_asked(service: Service, body: ChatBody, deadline: float | None) -> Asked:
    """What a chat asks for.

    Args:
        service: has the model.
        body: checked for its shape.
        deadline: for reading its images, in the event loop's time.

    Raises:
        Failure: fields contradict each other, ask for what is not there, or the model's
            template refuses the messages.
        InvalidRequest: a value is out of its range.
    """
    _refuse(body)
    service.check_images(count_images(body.messages), "messages")
    found = await render(service, body.messages, body)
    prompt = await service.prompt(found.ids, found.images, "messages", deadline)
    limit = body.max_completion_tokens
    limit = body.max_tokens if limit is None else limit
    top = (body.top_logprobs or 0) if body.logprobs else 0
    if body.top_logprobs and not body.logprobs:
        raise Failure(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return _asked(service, body, "chatcmpl", [prompt], limit, (bool(body.logprobs), -1, top), ())


async def completion_asked(service: Service, body: CompletionBody) -> Asked:
    """What a completion asks for; see `chat_asked`."""
    _refuse(body)
    if (body.best_of or 1) > (body.n or 1):
        raise Failure(400, "best_of: more than n is not supported by this server", "best_of")
    prompts = await service.off_loop(len(str(body.prompt)), lambda: _prompts(service, body))
    limit = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    wanted = body.logprobs is not None
    echo: tuple[str, ...] = ()
    if body.echo:
        decode = service.engine.tokenizer.decode
        echo = tuple(decode(each.ids) for each in prompts)
    scores = (wanted, 0 if wanted and body.echo else -1, body.logprobs or 0)
    return _asked(service, body, "cmpl", prompts, limit, scores, echo)


def _refuse(body: SharedBody) -> None:
    extra = body.model_extra or {}
    for name, instead in _REFUSED.items():
        if extra.get(name, getattr(body, name, None)) not in (None, False, [], {}, ""):
            way = instead or "leave it out"
            raise Failure(400, f"{name} is not supported by this server; {way}", name)


def _asked(
    service: Service,
    body: SharedBody,
    kind: str,
    prompts: Sequence[Prompt],
    limit: int | None,
    scores: tuple[bool, int, int],
    echo: tuple[str, ...],
) -> Asked:
    n = body.n or 1
    name = f"{kind}-{uuid.uuid4().hex}"
    rid = body.rid or name
    many = len(prompts) * n > 1
    params = _sampling_body(body)
    grammar = _grammar(body, params)
    context = service.engine.config.context_length
    limit = context if limit is None else limit
    least = min(params.min_new_tokens or 0, limit)
    params.min_new_tokens = least
    salt = "\0".join((body.extra_key or "", body.cache_salt or ""))
    requests = tuple(
        Request(
            f"{rid}_{index * n + sample}" if many else rid,
            prompt.ids,
            sampling_of(params, limit, sample),
            grammar,
            stream=bool(body.stream),
            return_logprob=scores[0],
            logprob_start_len=scores[1],
            top_logprobs_num=scores[2],
            priority=body.priority or 0,
            cache_salt=salt if len(salt) > 1 else None,
            images=prompt.images,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(n)
    )
    options = body.stream_options
    usage = (
        bool(options and options.include_usage),
        bool(options and options.continuous_usage_stats),
    )
    group = rid if many else None
    return Asked(name, requests, n, bool(body.stream), usage, echo, group)


def _sampling_body(body: SharedBody) -> SamplingBody:
    for bias in (body.logit_bias or {}).values():
        if not -_BIAS <= bias <= _BIAS:
            problem = f"logit_bias: must be biases in [-{_BIAS:g}, {_BIAS:g}], got {bias!r}"
            raise Failure(400, problem, "logit_bias")
    return SamplingBody(
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        stop_regex=body.stop_regex,
        json_schema=body.json_schema,
        regex=body.regex,
        ebnf=body.ebnf,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        no_stop_trim=body.no_stop_trim,
        logit_bias=body.logit_bias,
        sampling_seed=body.seed,
    )


def _grammar(body: SharedBody, params: SamplingBody) -> Grammar | None:
    given = grammar_of(params)
    asked = body.response_format
    if asked is None or asked.type == "text":
        return given
    if given is not None:
        raise Failure(400, "response_format does not go with another grammar", "response_format")
    match asked.type:
        case "json_object":
            return Grammar("json_schema", _ANY_OBJECT)
        case "json_schema":
            schema = asked.json_schema
            if schema is None or schema.json_schema is None:
                message = "response_format.json_schema.schema is needed"
                raise Failure(400, message, "response_format")
            return Grammar("json_schema", json.dumps(schema.json_schema))
        case other:
            message = f"response_format: {other} is not supported by this server"
            raise Failure(400, message, "response_format")


# -- prompts --------------------------------------------------------------------------------------


def _prompts(service: Service, body: CompletionBody) -> list[Prompt]:
    given = body.prompt
    encode = service.engine.tokenizer.encode
    if isinstance(given, str):
        prompts: list[Sequence[int]] = [encode(given) if given else ()]
    elif given and all(isinstance(each, int) for each in given):
        prompts = [[each for each in given if isinstance(each, int)]]
    else:
        prompts = [
            (encode(each) if each else ()) if isinstance(each, str) else each
            for each in given
            if not isinstance(each, int)
        ]
    if not prompts or not all(prompts):
        raise Failure(400, "prompt is empty; it needs at least one token", "prompt")
    return [Prompt(tuple(each)) for each in prompts]
