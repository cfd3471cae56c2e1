"""Several backends as one: the next where one fails, or the load spread over all."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Literal, TypeVar, get_args

from ..errors import BackendError, BadRequestError, InvalidArgument, UnsupportedFeature
from ..lang.chat_template import ChatTemplate
from ..types import Delta, Generation, GenRequest, Scores
from .base import FEATURES, Backend, Capabilities
from .fan_out import FanOut
from .retry import is_retryable

__all__ = ["Policy", "Router"]

T = TypeVar("T")
Policy = Literal["fallback", "round_robin", "least_busy"]


class Router(FanOut):
    """Backends behind one.

    A call that fails with an error that may pass, or that this backend's key or model is the
    cause of, goes to the next backend; a request that is bad in itself is raised at once. A
    stream changes backends only before its first piece.

    Each backend keeps its own retries: give them ``max_retries=0`` where going on is better
    than waiting.

    Utilities reach all backends that have them: ``flush_cache`` empties every cache, and
    ``get_server_info`` tells what each backend tells.

    Args:
        backends: at least one.
        policy: ``"fallback"`` takes them in order, ``"round_robin"`` by turns, ``"least_busy"``
            the one with the fewest calls under way.

    Raises:
        InvalidArgument: there is no backend, or no such policy.
    """

    name = "router"

    def __init__(self, backends: Sequence[Backend], policy: Policy = "fallback") -> None:
        if not backends:
            raise InvalidArgument("backends", "must have at least one")
        if policy not in get_args(Policy):
            raise InvalidArgument(
                "policy", f"must be one of {', '.join(get_args(Policy))}, got {policy!r}"
            )
        if len({backend.capabilities.wants_text for backend in backends}) > 1:
            raise InvalidArgument(
                "backends", "must all take messages, or all take one text, as completion models do"
            )
        self.backends = tuple(backends)
        self.policy = policy
        self.default_concurrency = sum(backend.default_concurrency for backend in backends)
        self.keeps_prefixes = any(backend.keeps_prefixes for backend in self.caching)
        self._turn = itertools.count()
        self._running = [0] * len(backends)
        self._calls = [0] * len(backends)
        self._passed_on = 0

    @property
    def capabilities(self) -> Capabilities:
        """What at least one of the backends can do: native only where all have it."""
        each = [backend.capabilities for backend in self.backends]
        native = frozenset.intersection(*(can.native for can in each))
        able = frozenset(f for f in FEATURES if any(can.support(f) != "refused" for can in each))
        hints: dict[str, str] = {}
        for can in reversed(each):
            hints |= {name: hint for name, hint in can.hints.items() if name not in able}
        return Capabilities(native, able - native, hints, each[0].wants_text)

    @property
    def identity(self) -> str:
        """Those of all backends."""
        return f"router[{', '.join(backend.identity for backend in self.backends)}]"

    @property
    def caching(self) -> Sequence[Backend]:
        """The backends that get calls while all is well."""
        return self.backends[:1] if self.policy == "fallback" else self.backends

    def check(self, request: GenRequest) -> None:
        """Refuse what none of the backends can do; see :meth:`Backend.check`."""
        self._able(lambda backend: backend.check(request))

    def check_select(self, request: GenRequest) -> None:
        """Refuse a ``select`` that none of the backends can do."""
        self._able(lambda backend: backend.check_select(request))

    async def generate(self, request: GenRequest) -> Generation:
        """Answer one request; see :meth:`Backend.generate`."""

        async def call(backend: Backend) -> Generation:
            generation = await backend.generate(request)
            return replace(generation, model=generation.model or backend.name)

        return await self._first(call, lambda backend: backend.check(request))

    async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
        """Answer one request piece by piece; see :meth:`Backend.stream`."""
        order = self._order(self._able(lambda backend: backend.check(request)))
        for place, at in enumerate(order):
            begun = False
            self._enter(at)
            try:
                async with aclosing(self.backends[at].stream(request)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
                return
            except (BackendError, UnsupportedFeature) as error:
                if begun or place == len(order) - 1 or not _goes_on(error):
                    raise
                self._passed_on += 1
            finally:
                self._running[at] -= 1

    async def score(
        self, request: GenRequest, choices: Sequence[str], *, unconditional: bool = False
    ) -> Scores:
        """Score choices; see :meth:`Backend.score`."""

        async def call(backend: Backend) -> Scores:
            return await backend.score(request, choices, unconditional=unconditional)

        return await self._first(call, lambda backend: backend.check_select(request))

    async def chat_template_in_use(self) -> ChatTemplate:
        """The template of the first backend."""
        return self.chat_template or await self.backends[0].chat_template_in_use()

    def statistics(self) -> Mapping[str, float]:
        """The sums of the backends' counters, and ``passed_on``: calls that changed backends."""
        total: dict[str, float] = {"passed_on": self._passed_on}
        for at, backend in enumerate(self.backends):
            total[f"calls_{at}"] = self._calls[at]
            for name, value in backend.statistics().items():
                total[name] = total.get(name, 0.0) + value
        return total

    async def aclose(self) -> None:
        """Close all backends, also where closing one of them fails; closing twice is fine."""
        async with AsyncExitStack() as closing:
            for backend in reversed(self.backends):
                closing.push_async_callback(backend.aclose)

    def __repr__(self) -> str:
        return f"<Router {self.policy} of {', '.join(map(repr, self.backends))}>"

    def _able(self, check: Callable[[Backend], None]) -> list[int]:
        """The backends that can do it, by number.

        Raises:
            UnsupportedFeature: the first one's, if none can.
        """
        able: list[int] = []
        refusals: list[UnsupportedFeature] = []
        for at, backend in enumerate(self.backends):
            try:
                check(backend)
            except UnsupportedFeature as error:
                refusals.append(error)
            else:
                able.append(at)
        if not able:
            raise refusals[0]
        return able

    def _order(self, able: list[int]) -> list[int]:
        if self.policy == "fallback":
            return able
        turn = next(self._turn)
        if self.policy == "round_robin":
            start = turn % len(able)
            return able[start:] + able[:start]
        count = len(self.backends)
        return sorted(able, key=lambda at: (self._running[at], (at - turn) % count))

    def _enter(self, at: int) -> None:
        self._running[at] += 1
        self._calls[at] += 1

    async def _first(
        self, call: Callable[[Backend], Awaitable[T]], check: Callable[[Backend], None]
    ) -> T:
        order = self._order(self._able(check))
        for place, at in enumerate(order):
            self._enter(at)
            try:
                return await call(self.backends[at])
            except (BackendError, UnsupportedFeature) as error:
                if place == len(order) - 1 or not _goes_on(error):
                    raise
                self._passed_on += 1
            finally:
                self._running[at] -= 1
        raise AssertionError("the loop returns or raises")


def _goes_on(error: BackendError | UnsupportedFeature) -> bool:
    """Whether another backend may do better; what one cannot do it may have learned just now."""
    if isinstance(error, UnsupportedFeature):
        return True
    return is_retryable(error) or not isinstance(error, BadRequestError)
