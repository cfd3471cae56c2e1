"""Requests of all kinds, drawn at random, and what must hold for their answers."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from asyncsgl_engine.request import Completion, Grammar, Request, Sampling

__all__ = ["GRAMMARS", "Mix", "assert_fits"]

PATTERNS = (r"-?[1-9]\d{2,4}(km|mile)", r"(yes|no|maybe), (sir|madam)", r"[a-f]{3,9}!")
SCHEMA = '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'
LARK = 'start: "on " /[a-z]{1,8}/ | "off"'
GRAMMARS = (
    Grammar("json_schema", SCHEMA),
    Grammar("ebnf", LARK),
    *(Grammar("regex", pattern) for pattern in PATTERNS),
)
_TEXTS = 257  # ids below it are bytes and the begin token


class Mix:
    """Draws requests whose prompts often begin alike.

    Args:
        chance: where the draws come from.
        longest: most tokens of a prompt and its answer together.
    """

    def __init__(self, chance: random.Random, longest: int) -> None:
        self._chance = chance
        self._longest = longest
        texts = random.Random(0)  # the same for everyone who draws
        self._stems = [[texts.randrange(_TEXTS) for _ in range(longest // 2)] for _ in range(4)]

    def request(self, name: str) -> Request:
        """One request of any kind."""
        chance = self._chance
        output = chance.choice([0, 1, 2, *[chance.randint(3, self._longest // 3)] * 6])
        prompt = self._prompt(self._longest - output)
        request = Request(
            name,
            prompt,
            self._sampling(output),
            stream=chance.random() < 0.5,
            priority=chance.choice([0, 0, 0, 1, 5]),
            cache_salt=chance.choice([None, None, "a", "b"]),
            no_cache=chance.random() < 0.1,
        )
        if chance.random() < 0.25:
            request = self._with_logprobs(request)
        if output > 2 and chance.random() < 0.25:
            request = self._with_grammar(request)
        return request

    def siblings(self, name: str) -> list[Request]:
        """Several answers to one prompt, as `n` asks for them."""
        one = self.request(name)
        return [replace(one, request_id=f"{name}-{n}") for n in range(self._chance.randint(2, 4))]

    def _prompt(self, most: int) -> tuple[int, ...]:
        stem = self._chance.choice(self._stems)
        known = stem[: self._chance.choice([0, 1, 7, len(stem) // 2, len(stem)])]
        own = [self._chance.randrange(_TEXTS) for _ in range(self._chance.randint(1, most))]
        return tuple((known + own)[:most])

    def _sampling(self, output: int) -> Sampling:
        chance = self._chance
        sampling = Sampling(
            max_new_tokens=output,
            min_new_tokens=chance.choice([0, 0, output // 2]),
            temperature=chance.choice([0.0, 0.0, 0.7, 1.3]),
            ignore_eos=chance.random() < 0.5,
        )
        if chance.random() < 0.5:
            sampling = replace(
                sampling,
                top_p=chance.choice([1.0, 0.9, 0.2]),
                top_k=chance.choice([-1, 1, 40]),
                min_p=chance.choice([0.0, 0.1]),
                seed=chance.choice([None, 0, -7, 2**40]),
            )
        if chance.random() < 0.3:
            sampling = replace(
                sampling,
                frequency_penalty=chance.choice([0.0, 0.8, -0.3]),
                presence_penalty=chance.choice([0.0, 1.1]),
                repetition_penalty=chance.choice([1.0, 1.4]),
                logit_bias=((chance.randrange(_TEXTS), chance.uniform(-100.0, 100.0)),),
            )
        if chance.random() < 0.3:
            sampling = replace(
                sampling,
                stop=chance.choice([(), ("e",), ("\n\n", "ab")]),
                stop_token_ids=chance.choice([(), (chance.randrange(_TEXTS),)]),
                stop_regex=chance.choice([(), (r"\d{2}",)]),
                no_stop_trim=chance.random() < 0.5,
            )
        return sampling

    def _with_logprobs(self, request: Request) -> Request:
        chance = self._chance
        return replace(
            request,
            return_logprob=True,
            logprob_start_len=chance.choice([-1, 0, len(request.prompt_ids) - 1]),
            top_logprobs_num=chance.choice([0, 3]),
            token_ids_logprob=chance.choice([(), (5, 6)]),
        )

    def _with_grammar(self, request: Request) -> Request:
        grammar = self._chance.choice(GRAMMARS)
        # a stop of another kind may cut the text short, and then it need not match
        plain = replace(
            request.sampling,
            min_new_tokens=0,
            stop=(),
            stop_token_ids=(),
            stop_regex=(),
            logit_bias=(),
        )
        return replace(request, grammar=grammar, sampling=plain)


def assert_fits(request: Request, answer: Completion) -> None:
    """An answer is what its request allows."""
    sampling, finish = request.sampling, answer.finish
    assert answer.request_id == request.request_id
    assert finish.prompt_tokens == len(request.prompt_ids)
    assert finish.completion_tokens == len(answer.token_ids) <= sampling.max_new_tokens
    assert 0 <= finish.cached_tokens < len(request.prompt_ids)
    assert 0.0 <= finish.queue_s <= finish.ttft_s <= finish.total_s
    assert finish.reason in ("stop", "length", "abort")
    if finish.reason == "abort":
        return
    if finish.reason == "length":
        assert len(answer.token_ids) == sampling.max_new_tokens
    if request.return_logprob:
        assert len(answer.logprobs) == len(answer.token_ids)
    scored = request.logprob_start_len
    assert len(answer.prompt_logprobs) == (len(request.prompt_ids) - scored if scored >= 0 else 0)
    if request.no_cache:
        assert finish.cached_tokens == 0
    grammar = request.grammar
    if grammar is not None and grammar.kind == "regex" and finish.reason == "stop":
        assert re.fullmatch(grammar.source, answer.text), (grammar.source, answer.text)
