"""What the backends of all providers share: planning, re-asking, choosing, streams."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from ..errors import (
    BackendError,
    ClosedError,
    InvalidArgument,
    UnsupportedFeature,
)
from ..lang.chat_template import ChatTemplate
from ..types import Completion, Delta, Generation, GenRequest, Scores, Timings, Usage
from .base import Backend, Capabilities
from .budget import Budget, known_price, price_per_million
from .calls import Call, ParameterRejected, Piece, Reply
from .choosing import choosing, chosen
from .estimates import UNSAID_LIMIT
from .gate import Gate
from .joined_stream import joined, together
from .limits import Limiter, limiter_for
from .planning import Plan, Profile, plan_call, stripped
from .reasking import formed
from .retry import SYSTEM_CLOCK, Clock, RetryPolicy, secret_id
from .sdk_errors import hide
from .settings import Settings
from .shown import Shown

__all__ = ["ProviderBackend"]

_PROGRAMS = 1024
"""Programs at once in a batch whose calls are bounded by what the service bears."""


class ProviderBackend(Backend):
    """A provider's model over its API. Subclasses know the wire.

    Args:
        name: what error messages and metas call it.
        model_name: the model.
        place: the provider, or the server's address: calls to the same place with the same
            key and model share limits and cooldowns.
        key: the API key, if it is known.
        settings: see :class:`Settings`.
        priced_as: the provider as price tables call it, or an address that they may know.
        fixed: what of the constructor's arguments changes the answers.
        chat_template: makes text of messages.
    """

    clock: Clock = SYSTEM_CLOCK
    """Time for limits and retries."""

    def __init__(
        self,
        name: str,
        model_name: str,
        *,
        place: str,
        key: str | None,
        settings: Settings,
        priced_as: str,
        fixed: Mapping[str, Any],
        chat_template: ChatTemplate | None,
    ) -> None:
        if not model_name:
            raise InvalidArgument("model_name", f"must name a model, got {model_name!r}")
        self.name = name
        self.model_name = model_name
        self.settings = settings
        self.chat_template = chat_template
        limiter = limiter_for(
            place,
            key,
            model_name,
            rpm=settings.rpm,
            tpm=settings.tpm,
            concurrency=settings.concurrency,
            clock=self.clock,
        )
        budget = Budget(
            price_per_million(*settings.price) if settings.price is not None else None,
            lambda: known_price(priced_as, model_name),
            settings.max_cost,
            settings.max_tokens_total,
        )
        policy = RetryPolicy(settings.max_retries, deadline=settings.deadline)
        self._gate = Gate(limiter, budget, policy, self.clock)
        self._place = place
        self._key = key
        self._fixed = dict(fixed)
        if settings.concurrency is not None:
            auto = isinstance(settings.concurrency, str)  # the limiter finds the bound then
            self.default_concurrency = _PROGRAMS if auto else int(settings.concurrency)
        self._lessons = 0
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

    @abstractmethod
    def translated(self, error: Exception) -> BackendError | None:
        """The error of asyncsgl for one raised around the provider's library; None for others."""

    async def prepare(self) -> None:
        """Make what calls need. None of them waits for that after it was let through: those
        that did would go out together, and be more than a minute allows.
        """

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
        fixed = secret_id(repr((sorted(self._fixed.items()), settings)))
        return json.dumps([self.name, self._place, self.model_name, fixed])

    @property
    def cost(self) -> float | None:
        """US dollars that this backend has spent; None if the price is unknown."""
        return self._gate.budget.cost

    @property
    def limiter(self) -> Limiter:
        """The limits, shared with all backends of the same place, key and model."""
        return self._gate.limiter

    @property
    def policy(self) -> RetryPolicy:
        """When calls are tried again."""
        return self._gate.policy

    @policy.setter
    def policy(self, policy: RetryPolicy) -> None:
        self._gate.policy = policy

    def check(self, request: GenRequest) -> None:
        """Refuse what this model cannot do; see :meth:`Backend.check`."""
        self._prepared(request)

    def check_select(self, request: GenRequest) -> None:
        """Refuse a ``select`` that this model cannot do; an open turn is no obstacle."""
        super().check_select(replace(request, continue_assistant=False))

    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request; see :meth:`Backend.generate`."""
        began = time.perf_counter()
        await self.prepare()
        while True:
            lessons, plan = self._lessons, self._plan(request)
            try:
                replies = await together([self._formed(plan, call) for call in plan.calls()])
            except ParameterRejected as error:
                self._learn(error, lessons)
                continue
            return self._generation(request, plan, replies, Timings(time.perf_counter() - began))

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; see :meth:`Backend.stream`."""
        await self.prepare()
        while True:
            lessons, plan = self._lessons, self._plan(request)
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
                self._learn(error, lessons)
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
        await self.prepare()
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
        usage = self._gate.budget.usage
        values: dict[str, float] = {
            "requests": usage.requests,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "retries": self._gate.retries,
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

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Raise the errors of the provider's library as ours."""
        try:
            yield
        except (BackendError, UnsupportedFeature):
            raise
        except Exception as error:
            mine = self.translated(error)
            if mine is None:
                raise
            if self._key:
                hide(self._key, mine)
            raise mine from error

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
        if profile.default_max_tokens is None and self._gate.budget.bounded:
            profile = replace(profile, default_max_tokens=UNSAID_LIMIT)
        plan = plan_call(prepared, profile, self.name)
        return replace(plan, emulated=(*plan.emulated, *dropped)) if dropped else plan

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError(f"this {type(self).__name__} is closed: make a new one")

    def _learn(self, rejected: ParameterRejected, lessons: int) -> None:
        """Go on after a rejection, or raise it as what it is.

        Args:
            rejected: the rejection.
            lessons: how many there had been when the call was planned; a call beside it may
                have had the same one since.
        """
        if self.learn(rejected):
            self._lessons += 1
        elif self._lessons == lessons:
            raise rejected.as_bad_request() from rejected

    # -- one answer ------------------------------------------------------------------------------

    def _formed(self, plan: Plan, call: Call) -> Coroutine[Any, Any, Reply]:
        return formed(
            call,
            plan.form,
            lambda call: self._cut_reply(plan, call),
            max_reasks=self.settings.max_reasks,
            backend=self.name,
        )

    async def _cut_reply(self, plan: Plan, call: Call) -> Reply:
        """One reply, ended at the stops that are enforced here."""
        if not plan.stops and not plan.patterns:
            return await self._gate.answer(call, lambda: self.ask(call))
        shown = Shown(self.name, plan)
        async with aclosing(shown.through(self._sent(call))) as pieces:
            async for _ in pieces:
                pass
        return shown.reply(call)

    def _sent(self, call: Call) -> AsyncGenerator[Piece, None]:
        return self._gate.pieces(call, lambda: self.pieces(call))

    # -- streams ---------------------------------------------------------------------------------

    async def _streamed(self, request: GenRequest, plan: Plan) -> AsyncGenerator[Delta, None]:
        began = time.perf_counter()
        first: float | None = None
        calls = plan.calls()
        shown = [Shown(self.name, plan) for _ in calls]
        streams = [one.through(self._sent(call)) for one, call in zip(shown, calls, strict=True)]
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
