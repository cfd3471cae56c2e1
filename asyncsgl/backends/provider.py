"""What the backends of all providers share: planning, retries, limits, cutting, re-asking."""

from __future__ import annotations

import asyncio
import json
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import (
    BackendError,
    BadRequestError,
    ClosedError,
    InvalidArgument,
    OutputError,
    OverloadedError,
    UnsupportedFeature,
)
from ..types import (
    Completion,
    Delta,
    Generation,
    GenRequest,
    Scores,
    Timings,
    Usage,
)
from .base import Backend, Capabilities
from .budget import Budget, known_price, price_per_million
from .calls import Call, ParameterRejected, Piece, Reply
from .choosing import choosing, chosen
from .forms import Form
from .joined_stream import joined
from .limits import Ticket, limiter_for
from .planning import Plan, Profile, instructed, plan_call, stripped
from .retry import RetryPolicy, retried, retried_stream, secret_id
from .settings import Settings
from .shown import Shown

__all__ = ["ProviderBackend"]

T = TypeVar("T")
_IMAGE_TOKENS = 1500
_UNSAID_LIMIT = 4096


class ProviderBackend(Backend):
    """A provider's model over its API. Subclasses know the wire.

    Args:
        name: what error messages and metas call it.
        model_name: the model.
        place: the provider, or the server's address: calls to the same place with the same
            key and model share limits and cooldowns.
        key: the API key, if it is known.
        settings: see :class:`Settings`.
        priced_as: the provider as price tables call it.
    """

    def __init__(
        self,
        name: str,
        model_name: str,
        *,
        place: str,
        key: str | None,
        settings: Settings,
        priced_as: str,
    ) -> None:
        if not model_name:
            raise InvalidArgument("model_name", f"must name a model, got {model_name!r}")
        self.name = name
        self.model_name = model_name
        self.settings = settings
        self.policy = RetryPolicy(settings.max_retries, deadline=settings.deadline)
        self.limiter = limiter_for(
            place,
            key,
            model_name,
            rpm=settings.rpm,
            tpm=settings.tpm,
            concurrency=settings.concurrency,
        )
        self._cooldown = self.limiter.cooldown
        self._place = place
        self._fixed_args: dict[str, Any] = {}
        self.budget = Budget(
            price_per_million(*settings.price) if settings.price is not None else None,
            lambda: known_price(priced_as, model_name),
            settings.max_cost,
            settings.max_tokens_total,
        )
        if isinstance(settings.concurrency, int):
            self.default_concurrency = settings.concurrency
        self._retries = 0
        self._tokens_per_character = 0.25
        self._answer_tokens: float | None = None
        self._closed = False

    # -- what a provider defines ------------------------------------------------------------

    @property
    @abstractmethod
    def profile(self) -> Profile:
        """What the model takes, as far as is known by now."""

    @abstractmethod
    async def ask(self, call: Call) -> Reply:
        """Make one call. Raises the errors of asyncsgl, each by one table."""

    @abstractmethod
    def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Make one call and give its reply as it comes."""

    def learn(self, rejected: ParameterRejected) -> bool:  # noqa: ARG002 - for subclasses
        """Change the profile after a rejection; False if nothing can be changed."""
        return False

    # -- the contract --------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do, as far as is known by now."""
        return self.profile.capabilities

    @property
    def identity(self) -> str:
        """The place, the model, and what is sent with every call."""
        settings = [self.settings.drop_params, self.settings.max_reasks]
        fixed = secret_id(repr((sorted(self._fixed_args.items()), settings)))
        return json.dumps([self.name, self._place, self.model_name, fixed])

    @property
    def cost(self) -> float | None:
        """US dollars that this backend has spent; None if the price is unknown."""
        return self.budget.cost

    def check(self, request: GenRequest) -> None:
        """Refuse what this model cannot do; see :meth:`Backend.check`."""
        self._prepared(request)

    def check_select(self, request: GenRequest) -> None:
        """Refuse a ``select`` that this model cannot do; an open turn is no obstacle."""
        super().check_select(replace(request, continue_assistant=False))

    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request; see :meth:`Backend.generate`."""
        began = time.perf_counter()
        while True:
            plan = self._plan(request)
            try:
                replies = await _together([self._formed(plan) for _ in range(plan.copies)])
            except ParameterRejected as error:
                self._learn(error)
                continue
            return self._generation(request, plan, replies, Timings(time.perf_counter() - began))

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; see :meth:`Backend.stream`."""
        while True:
            plan = self._plan(request)
            if plan.form is not None and not plan.form.as_it_comes:
                generation = await self.generate(request)
                for index, completion in enumerate(generation.completions):
                    yield Delta(completion.text, index, completion.reasoning or "")
                yield Delta(generation=generation)
                return
            try:
                async with aclosing(self._streamed(request, plan)) as deltas:
                    async for delta in deltas:
                        yield delta
            except ParameterRejected as error:
                self._learn(error)
                continue
            return

    async def score(
        self,
        request: GenRequest,
        choices: Sequence[str],
        *,
        unconditional: bool = False,  # noqa: ARG002 - for those that can
    ) -> Scores:
        """Let the model choose among ``choices``; there are no scores of them.

        Raises as :meth:`Backend.score`, and OutputError when the model names none.
        """
        return await self.choose(request, choices)

    async def choose(self, request: GenRequest, choices: Sequence[str]) -> Scores:
        """One choice, by a schema where the provider enforces one, else by asking for it."""
        asking, how = choosing(request, choices, self.profile)
        generation = await self.generate(asking)
        return Scores(
            decision=chosen(generation.completions[0].text, choices, self.profile, self.name),
            usage=generation.usage,
            emulated=how,
            timings=generation.timings,
        )

    def statistics(self) -> Mapping[str, float]:
        """Requests, tokens, retries, calls running and waiting, and the cost where known."""
        usage = self.budget.usage
        values: dict[str, float] = {
            "requests": usage.requests,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "retries": self._retries,
            "running": self.limiter.running,
            "waiting": self.limiter.waiting,
        }
        if self.cost is not None:
            values["cost"] = self.cost
        return values

    async def aclose(self) -> None:
        """Close all connections; closing twice is fine."""
        self._closed = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model_name!r}>"

    # -- planning ------------------------------------------------------------------------------

    def _prepared(self, request: GenRequest) -> tuple[GenRequest, tuple[str, ...]]:
        """The request as the model takes it, and what was dropped from it.

        Raises:
            UnsupportedFeature: the model cannot do it.
        """
        profile = self.profile
        request = stripped(request, profile)
        sampling = request.sampling
        if sampling.max_tokens == 0:
            raise UnsupportedFeature(
                self.name, "max_tokens=0", "ask for at least one token: APIs have no empty answer"
            )
        can = profile.capabilities
        dropped = [name for name in sampling.given() if can.support(name) == "refused"]
        if dropped and self.settings.drop_params:
            kept = replace(sampling, **dict.fromkeys(dropped))
            request = replace(request, sampling=kept)
        super().check(request)
        return request, tuple(f"{name}: dropped" for name in dropped)

    def _plan(self, request: GenRequest) -> Plan:
        self._refuse_closed()
        prepared, dropped = self._prepared(request)
        profile = self.profile
        if profile.default_max_tokens is None and self.budget.bounded:
            profile = replace(profile, default_max_tokens=_UNSAID_LIMIT)
        plan = plan_call(prepared, profile, self.name)
        return replace(plan, emulated=(*plan.emulated, *dropped)) if dropped else plan

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError(f"this {type(self).__name__} is closed: make a new one")

    def _learn(self, rejected: ParameterRejected) -> None:
        """Go on after a rejection, or raise it as what it is."""
        if not self.learn(rejected):
            raise BadRequestError(
                rejected.message,
                backend=rejected.backend,
                request_id=rejected.request_id,
                status=rejected.status,
            ) from rejected

    # -- one answer ------------------------------------------------------------------------------

    async def _formed(self, plan: Plan) -> Reply:
        """One reply, asked for again while its text has not the form."""
        form, call, usage = plan.form, plan.call, Usage()
        reason = ""
        for _ in range(self.settings.max_reasks + 1):
            reply = await self._cut_reply(plan, call)
            usage += reply.usage
            if form is None or form.as_it_comes:
                return reply
            completion = reply.completions[0]
            try:
                text = form.read(completion.text)
            except ValueError as error:
                reason = str(error)
                if completion.finish_reason != "stop":
                    return replace(reply, usage=usage)
            else:
                return replace(reply, completions=(replace(completion, text=text),), usage=usage)
            call = _corrected(plan.call, form, completion.text, reason)
        raise OutputError(
            f"{self.name} gave no answer of the form asked for in {self.settings.max_reasks + 1} "
            f"tries; the last one: {reason}"
        )

    async def _cut_reply(self, plan: Plan, call: Call) -> Reply:
        """One reply, ended at the stops that are enforced here."""
        if not plan.stops and not plan.patterns:
            return await retried(
                lambda: self._asked(call),
                self.policy,
                cooldown=self._cooldown,
                on_retry=self._count_retry,
            )
        shown = Shown(self.name, plan)
        async with aclosing(shown.through(self._sent(call))) as pieces:
            async for _ in pieces:
                pass
        return shown.reply(call)

    async def _asked(self, call: Call) -> Reply:
        async with self._admitted(call) as ticket:
            reply = await self.ask(call)
            ticket.settle(reply.usage)
            return reply

    def _sent(self, call: Call) -> AsyncGenerator[Piece, None]:
        """The pieces of one call, tried again while none has come."""
        return retried_stream(
            lambda: self._opened(call),
            self.policy,
            cooldown=self._cooldown,
            on_retry=self._count_retry,
        )

    async def _opened(self, call: Call) -> AsyncGenerator[Piece, None]:
        async with self._admitted(call) as ticket, aclosing(self.pieces(call)) as pieces:
            async for piece in pieces:
                if piece.usage is not None:
                    ticket.settle(piece.usage)
                yield piece

    @asynccontextmanager
    async def _admitted(self, call: Call) -> AsyncGenerator[Ticket, None]:
        """Hold a place in the limits and the budget while one call is under way."""
        characters = call.size()
        prompt = round(characters * self._tokens_per_character) + _IMAGE_TOKENS * sum(
            not isinstance(part, str) for message in call.messages for part in message.parts
        )
        most = (call.max_tokens or _UNSAID_LIMIT) * (call.sampling.n or 1)
        likely = most if self._answer_tokens is None else min(most, 1.2 * self._answer_tokens + 8)
        await self.budget.ready()
        hold = self.budget.hold(max(prompt, characters // 3), most)
        usage: Usage | None = None
        try:
            async with self.limiter.admitted(prompt + likely) as ticket:
                try:
                    yield ticket
                except OverloadedError:
                    ticket.refuse()
                    raise
                finally:
                    usage = ticket.usage
        finally:
            self.budget.settle(hold, usage)
            if usage is not None:
                self._correct_estimates(characters, usage)

    def _correct_estimates(self, characters: int, usage: Usage) -> None:
        """Move the estimates towards what a call really cost."""
        if characters >= 64:
            measured = usage.prompt_tokens / characters
            self._tokens_per_character += 0.1 * (min(measured, 2.0) - self._tokens_per_character)
        answer = float(usage.completion_tokens)
        known = self._answer_tokens
        self._answer_tokens = answer if known is None else known + 0.1 * (answer - known)

    def _count_retry(self, number: int, error: BackendError, delay: float) -> None:  # noqa: ARG002
        self._retries += 1

    # -- streams ---------------------------------------------------------------------------------

    async def _streamed(self, request: GenRequest, plan: Plan) -> AsyncGenerator[Delta, None]:
        began = time.perf_counter()
        first: float | None = None
        shown = [Shown(self.name, plan) for _ in range(plan.copies)]
        streams = [one.through(self._sent(plan.call)) for one in shown]
        async with aclosing(joined(streams)) as pieces:
            async for copy, piece in pieces:
                if piece.text or piece.reasoning or piece.logprobs:
                    first = time.perf_counter() - began if first is None else first
                    index = copy if plan.copies > 1 else piece.index
                    yield Delta(piece.text, index, piece.reasoning, piece.logprobs)
        replies = [one.reply(plan.call) for one in shown]
        timings = Timings(time.perf_counter() - began, first)
        yield Delta(generation=self._generation(request, plan, replies, timings))

    def _generation(
        self, request: GenRequest, plan: Plan, replies: Sequence[Reply], timings: Timings
    ) -> Generation:
        completions: tuple[Completion, ...] = ()
        usage = Usage()
        for reply in replies:
            completions += reply.completions
            usage += reply.usage
        emulated = plan.emulated
        if usage.requests > len(replies):
            emulated += (f"asked {usage.requests} times",)
        return Generation(
            completions,
            usage,
            replies[0].request_id or request.request_id,
            replies[0].model or self.model_name,
            timings,
            emulated,
        )


def _corrected(call: Call, form: Form, bad: str, reason: str) -> Call:
    """The call that asks again."""
    if call.text is not None:
        return call
    if call.prefill:
        *before, last = call.messages
        _, said = form.correction(bad, reason)
        return replace(call, messages=(*instructed(tuple(before), said.text), last))
    return call.followed_by(*form.correction(bad, reason))


async def _together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all ``calls``; when one fails, the others are cancelled first."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
