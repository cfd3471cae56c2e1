"""How a choice is made in OpenAI's language: echoed prompts, token by token, or by decisions."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadRequestError, NotFoundError, OutputError
from ..types import GenRequest, SamplingParams, Scores, Usage
from .calls import Call, Reply
from .openai_models import Learned
from .openai_scores import (
    MAX_CHOICES,
    Echoed,
    NoLogprobs,
    choice_scores,
    decision_input,
    decision_scores,
)
from .openai_wire import completion_reply
from .planning import Profile
from .provider import ProviderBackend
from .token_walk import Tokenizer, TokenWalk, known_tokenizer

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Completion as TextCompletion

__all__ = ["SelectingBackend"]


class SelectingBackend(ProviderBackend):
    """The part of the OpenAI backend that chooses among texts.

    Attributes:
        chat: the model takes messages, not a text.
        learned: what the service refused.
        tokenizer: the model's, where it is known.
    """

    chat: bool
    learned: Learned
    tokenizer: Tokenizer | None
    _profile: Profile | None
    _request_args: dict[str, Any]

    @abstractmethod
    async def client(self) -> AsyncOpenAI:
        """The SDK's client on the running loop."""

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score the choices where the API can, else let the model choose.

        Completion models score by the logprobs of echoed prompts, or are led token by token;
        some chat models answer the Decisions API; the others choose by a schema.
        """
        self._refuse_closed()
        await self.prepare()
        if not self.chat:
            return await self._continued(request, choices, unconditional)
        if self.capabilities.support("select") == "native" and _can_decide(request, choices):
            try:
                return await self._decided(request, choices)
            except (NotFoundError, _NotThere):  # only OpenAI's newest API has them, and SDK 3
                self._do_without("decisions")
        return await self.choose(request, choices)

    def _do_without(self, name: str) -> None:
        self.learned.do_without(name)
        self._profile = None

    async def _continued(
        self, request: GenRequest, choices: Sequence[str], unconditional: bool
    ) -> Scores:
        if "echo" not in self.learned.wire:
            try:
                return await self._echoed(request, choices, unconditional)
            except NoLogprobs:
                self._do_without("echo")
            except BadRequestError as error:
                if "echo" not in error.message and "logprobs" not in error.message:
                    raise
                self._do_without("echo")
        tokenizer = await self._known_tokenizer()
        if tokenizer is None:
            return await self.choose(request, choices)
        return await self._walked(request, choices, tokenizer)

    async def _known_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, looked for once."""
        if self.tokenizer is None and "tokenizer" not in self.learned.wire:
            self.tokenizer = await asyncio.to_thread(known_tokenizer, self.model_name)
            if self.tokenizer is None:
                self._do_without("tokenizer")
        return self.tokenizer

    async def _echoed(
        self, request: GenRequest, choices: Sequence[str], unconditional: bool
    ) -> Scores:
        prompt = request.text or ""
        prompts = [prompt + choice for choice in choices]
        if unconditional:
            prompts += ["\n" + choice for choice in choices]

        async def once() -> Echoed:
            found = await self._completed(prompt=prompts, max_tokens=0, echo=True, logprobs=1)
            return choice_scores(found, prompt, choices, unconditional)

        call = Call(request.messages, request.sampling, 0, request.request_id, "".join(prompts))
        found = await self._gate.answer(call, once)
        return Scores(found.scores, usage=found.usage)

    async def _walked(
        self, request: GenRequest, choices: Sequence[str], tokenizer: Tokenizer
    ) -> Scores:
        prompt = request.text or ""
        walk = TokenWalk([prompt + choice for choice in choices], tokenizer)
        usage = Usage()
        while (decision := walk.decision) is None:
            bias = {str(token): 100 for token in walk.options()}

            async def step(bias: Mapping[str, int] = bias) -> Reply:
                found = await self._completed(
                    prompt=walk.prefix,
                    max_tokens=1,
                    temperature=request.sampling.temperature or 0.0,
                    logit_bias=bias,
                )
                return completion_reply(found, self.name)

            call = Call(request.messages, SamplingParams(), 1, request.request_id, prompt)
            reply = await self._gate.answer(call, step)
            usage += reply.usage
            if not walk.take(reply.completions[0].text):
                said, allowed = reply.completions[0].text, sorted(walk.options().values())
                raise OutputError(f"{self.name} went on with {said!r}, which is none of {allowed}")
        how = "select: token by token, with logit_bias"
        return Scores(decision=decision, usage=usage, emulated=(how,))

    async def _completed(self, **body: Any) -> TextCompletion:
        client = await self.client()
        with self.translating():
            found: TextCompletion = await client.completions.create(
                model=self.model_name, **body, **self._request_args
            )
            return found

    async def _decided(self, request: GenRequest, choices: Sequence[str]) -> Scores:
        items, instructions = decision_input(request, self.name)
        question = {
            "type": "choice",
            "instructions": instructions,
            "choices": [{"value": choice} for choice in choices],
        }

        async def once() -> Scores:
            client = await self.client()
            decisions = getattr(client, "decisions", None)
            if decisions is None:
                raise _NotThere
            with self.translating():
                found = await decisions.create(
                    model=self.model_name, input=items, questions=[question]
                )
            return decision_scores(found, choices, self.name)

        call = Call(request.messages, request.sampling, 1, request.request_id)
        return await self._gate.answer(call, once)


class _NotThere(Exception):
    """The installed SDK has no such API."""


def _can_decide(request: GenRequest, choices: Sequence[str]) -> bool:
    distinct = len(set(choices)) == len(choices)
    said = all(message.role is not None for message in request.messages)
    return said and distinct and 2 <= len(choices) <= MAX_CHOICES
