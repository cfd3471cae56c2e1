"""What the fake server has for a model: scripted texts, a small tokenizer, made-up logprobs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .faults import Abort

__all__ = ["Answer", "Asked", "FakeModel", "Mistake", "Script"]

Script = str | Sequence[str] | Mapping[str, str] | Callable[[str], str]
"""One text for all, texts in order, a table from a part of the prompt, or a function of it."""

_SAMPLING = frozenset(
    (
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "stop",
        "stop_token_ids",
        "stop_regex",
        "n",
        "beam_width",
        "json_schema",
        "regex",
        "ebnf",
        "structural_tag",
        "choice",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "no_stop_trim",
        "stream_interval",
        "logit_bias",
        "sampling_seed",
        "custom_params",
        "watermark",
    )
)
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


class Mistake(Exception):
    """The request is refused with status 400.

    Attributes:
        body: of the answer.
    """

    def __init__(self, body: object) -> None:
        super().__init__(str(body))
        self.body = body


def _bad_value(message: str) -> Mistake:
    return Mistake({"error": {"message": message}})


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the server understands it, one entry of each list for each prompt."""

    prompts: tuple[str | tuple[int, ...], ...]
    sampling: tuple[Mapping[str, Any], ...]
    rids: tuple[str, ...]
    listed: bool
    stream: bool = False
    logprobs: bool = False
    start: int = -1
    top: int = 0
    texts: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Asked:
        """Read a body.

        Raises:
            Mistake: SGLang's server refuses it.
        """
        given = body.get("text", body.get("input_ids"))
        if given is None:
            raise _bad_value("one of text, input_ids and input_embeds is needed")
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts = [given] if single else list(given)
        params = body.get("sampling_params") or {}
        several = isinstance(params, list)
        each = params if several else [params] * len(prompts)
        for one in each:
            _check_sampling(one)
        count = each[0].get("n", 1)
        if not single or count > 1:
            _check_images(body.get("image_data"), len(prompts))
        rid = body.get("rid")
        rids = rid if isinstance(rid, list) else [rid] if isinstance(rid, str) and single else []
        if len(set(rids)) != len(rids):
            raise _bad_value("duplicate request ids")
        numbers = itertools.count(1)
        # with several answers for a prompt the client's ids are replaced
        names = rids if rids and count == 1 else [f"server-{next(numbers)}" for _ in prompts]
        return cls(
            tuple(tuple(p) if isinstance(p, list) else p for p in prompts for _ in range(count)),
            tuple(one for one in each for _ in range(count)),
            tuple(name for name in names for _ in range(count)),
            not single or count > 1,
            bool(body.get("stream")),
            bool(body.get("return_logprob")),
            body.get("logprob_start_len", -1),
            body.get("top_logprobs_num", 0),
            bool(body.get("return_text_in_logprobs")),
        )


def _check_images(images: object, prompts: int) -> None:
    """In a batch, and several answers to one prompt are one, each prompt has its own entry."""
    if isinstance(images, list) and images and len(images) != prompts:
        raise _bad_value("image_data needs one entry for each prompt of a batch")


def _check_sampling(params: Mapping[str, Any]) -> None:
    for name in params:
        if name not in _SAMPLING:
            raise Mistake({"error": f"unexpected keyword argument {name!r}"})
    if sum(bool(params.get(name)) for name in _GRAMMARS) > 1:
        raise _bad_value("only one of regex, json_schema, ebnf and structural_tag")
    if not isinstance(params.get("json_schema", ""), str):
        raise _bad_value("json_schema must be a string")
    if params.get("temperature", 1.0) < 0:
        raise _bad_value("temperature must be non-negative")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole.

    Args:
        rid: the request's id.
        tokens: of the answer.
        ids: of the tokens.
        prompt: the prompt's entries of logprobs, from the position asked for.
        prompt_tokens: how many tokens the prompt has.
        finish: the finish reason.
        logprobs: one for each token.
    """

    rid: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    prompt: tuple[tuple[float | None, int, str], ...]
    prompt_tokens: int
    finish: Mapping[str, Any]
    logprobs: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Chunks of its stream."""
        return max(len(self.tokens), 1)

    def aborted(self, fault: Abort) -> Answer:
        """The answer as an abort leaves it."""
        finish: dict[str, Any] = {"type": "abort", "message": fault.message}
        if fault.status_code is not None:
            finish |= {"status_code": fault.status_code, "err_type": "ServiceUnavailable"}
        return replace(
            self,
            tokens=self.tokens[: fault.after],
            ids=self.ids[: fault.after],
            logprobs=self.logprobs[: fault.after],
            finish=finish,
        )

    def result(self, asked: Asked, *, ids: bool) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        return self.chunk(asked, self.steps, incremental=False, ids=ids)

    def chunk(self, asked: Asked, step: int, *, incremental: bool, ids: bool) -> dict[str, Any]:
        """The chunk that follows the token number ``step``, from 1."""
        first = step - 1 if incremental else 0
        last = step == self.steps
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": dict(self.finish) if last else None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": min(step, len(self.tokens)),
            "cached_tokens": 0,
        }
        if asked.logprobs:
            meta |= self._logprobs(asked, first, step)
        chunk: dict[str, Any] = {"text": "".join(self.tokens[first:step]), "meta_info": meta}
        if ids:
            chunk["output_ids"] = list(self.ids[first:step])
        return chunk

    def _logprobs(self, asked: Asked, first: int, step: int) -> dict[str, Any]:
        rows = zip(self.logprobs, self.ids, self.tokens, strict=True)
        made = [[value, token, text if asked.texts else None] for value, token, text in rows]
        shown = made[first:step]
        if not self.tokens:  # a prompt that is only computed has one all the same
            shown = [[-1.0, 1, None]]
        told: dict[str, Any] = {
            "input_token_logprobs": [
                [value, token, text if asked.texts else None] for value, token, text in self.prompt
            ],
            "output_token_logprobs": shown,
        }
        if asked.top:
            told["output_top_logprobs"] = [
                [[entry[0], entry[1], entry[2]]] * asked.top for entry in shown
            ]
            told["input_top_logprobs"] = [None] * len(self.prompt)
        return told


def words(text: str) -> list[str]:
    """Words with the space before them, and all else by the character."""
    return re.findall(r" ?\w+|\s|[^\w\s]", text)


@dataclass(slots=True)
class FakeModel:
    """Answers by a script.

    Args:
        script: see :data:`Script`; an answer ends at a stop string and at ``max_new_tokens``.
        tokenize: cuts a text into tokens.
        logprob: of a token after the tokens before it.
        begin: a token that is put before every prompt that is text.
        pads: the first entry of a prompt's logprobs is null wherever it begins.
    """

    script: Script = ""
    tokenize: Callable[[str], list[str]] = words
    logprob: Callable[[Sequence[str], str], float] = lambda *_: -1.0
    begin: str = ""
    pads: bool = False
    _ids: dict[str, int] = field(default_factory=dict[str, int])
    _texts: list[str] = field(default_factory=list[str])
    _given: int = 0

    def answers(self, asked: Asked) -> list[Answer]:
        """One answer for each prompt.

        Raises:
            Mistake: the request cannot be answered.
        """
        each = zip(asked.prompts, asked.sampling, asked.rids, strict=True)
        return [self._answer(asked, *one) for one in each]

    def _answer(
        self, asked: Asked, prompt: str | tuple[int, ...], params: Mapping[str, Any], rid: str
    ) -> Answer:
        if isinstance(prompt, str):
            before = [*([self.begin] if self.begin else []), *self.tokenize(prompt)]
        else:
            before = [self._texts[token] for token in prompt]
        if not prompt and not self.begin:
            raise _bad_value("the prompt is empty")
        if asked.start > len(before):
            raise _bad_value("logprob_start_len is higher than the number of input tokens")
        tokens, finish = self._ended(self._text("".join(before)), params)
        shown = self._prompt_logprobs(before, asked.start) if asked.start >= 0 else []
        logprobs = [self.logprob([*before, *tokens[:at]], token) for at, token in enumerate(tokens)]
        return Answer(
            rid,
            tuple(tokens),
            tuple(map(self.id_of, tokens)),
            tuple(shown),
            len(before),
            finish,
            tuple(logprobs),
        )

    def _text(self, prompt: str) -> str:
        script = self.script
        if isinstance(script, str):
            return script
        if isinstance(script, Mapping):
            return next((answer for part, answer in script.items() if part in prompt), "")
        if callable(script):
            return script(prompt)
        self._given += 1
        return script[(self._given - 1) % len(script)]

    def _ended(self, text: str, params: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        finish: dict[str, Any] = {"type": "stop", "matched": 2}
        stops = params.get("stop") or ()
        for stop in [stops] if isinstance(stops, str) else stops:
            text, found, _ = text.partition(stop)
            if found:
                finish = {"type": "stop", "matched": stop}
        tokens = self.tokenize(text)
        patterns = params.get("stop_regex") or ()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            for count in range(1, len(tokens) + 1):
                if re.search(pattern, "".join(tokens[:count])):  # which stays in the text
                    tokens, finish = tokens[:count], {"type": "stop", "matched": pattern}
                    break
        most = params.get("max_new_tokens", 128)
        if most is not None and len(tokens) > most:
            return tokens[:most], {"type": "length", "length": most}
        return tokens, {"type": "length", "length": 0} if most == 0 else finish

    def _prompt_logprobs(
        self, tokens: Sequence[str], start: int
    ) -> list[tuple[float | None, int, str]]:
        return [
            (
                None
                if at == 0 or (self.pads and at == start)
                else self.logprob(tokens[:at], token),
                self.id_of(token),
                token,
            )
            for at, token in enumerate(tokens)
            if at >= start
        ]

    def id_of(self, token: str) -> int:
        """The number of a token."""
        if token not in self._ids:
            self._ids[token] = len(self._texts)
            self._texts.append(token)
        return self._ids[token]
