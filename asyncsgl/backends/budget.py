"""What calls cost, and a bound on it that is kept before the money is spent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import BudgetExceeded, InvalidArgument
from ..types import Usage

__all__ = ["Budget", "Hold", "Price", "known_price", "price_per_million"]

_TIERS_FROM = 100_000
"""Prompt tokens below which no provider has another price."""

Price = Callable[[Usage], float]
"""The cost of a call in US dollars."""


def known_price(provider: str, model: str) -> Price | None:
    """The price of ``model`` by the table of the package genai-prices; None if unknown.

    Args:
        provider: as that table calls it (``"openai"``, ``"anthropic"``, ``"google"``,
            ``"azure"``), or an address that it may know; empty if it is unknown.
        model: the model's name.
    """
    if not provider:
        return None
    try:
        import genai_prices
    except ImportError:
        return None

    def price(usage: Usage) -> float:
        priced = genai_prices.Usage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            cache_read_tokens=min(usage.cached_tokens, usage.prompt_tokens),
            cache_write_tokens=min(
                usage.cache_write_tokens, max(0, usage.prompt_tokens - usage.cached_tokens)
            ),
        )
        if "://" in provider:
            found = genai_prices.calc_price(priced, model_ref=model, provider_api_url=provider)
        else:
            found = genai_prices.calc_price(priced, model_ref=model, provider_id=provider)
        return float(found.total_price)

    try:
        return _straight(price)
    except (LookupError, ValueError):
        return None


def _straight(price: Price) -> Price:
    """The same price, by a factor for each kind of token for short prompts: the table takes long for each call."""
    size = 1000
    prompt, answer = price(Usage(size)) / size, price(Usage(0, size)) / size
    cached = price(Usage(size, 0, size)) / size
    written = price(Usage(size, cache_write_tokens=size)) / size

    def quick(usage: Usage) -> float:
        if usage.prompt_tokens > _TIERS_FROM:
            return price(usage)
        read = min(usage.cached_tokens, usage.prompt_tokens)
        write = min(usage.cache_write_tokens, usage.prompt_tokens - read)
        fresh = usage.prompt_tokens - read - write
        prompts = fresh * prompt + read * cached + write * written
        return prompts + usage.completion_tokens * answer

    return quick


def price_per_million(prompt: float, completion: float) -> Price:
    """A price in US dollars for a million tokens of each kind."""

    def price(usage: Usage) -> float:
        return (usage.prompt_tokens * prompt + usage.completion_tokens * completion) / 1e6

    return price


@dataclass(frozen=True, slots=True)
class Hold:
    """What is set aside for one call."""

    tokens: int
    cost: float


_FREE = Hold(0, 0.0)


class Budget:
    """Counts what was spent, and refuses a call that could pass the bound.

    Args:
        price: of the model; None if it must be looked up.
        find_price: looks it up, in a thread, before the first call; None if it is unknown.
        max_cost: US dollars that may be spent; None for no bound.
        max_tokens_total: tokens that may be used, prompts and answers; None for no bound.

    Raises:
        InvalidArgument: a bound is not above 0.
    """

    def __init__(
        self,
        price: Price | None,
        find_price: Callable[[], Price | None],
        max_cost: float | None,
        max_tokens_total: int | None,
    ) -> None:
        for name, bound in (("max_cost", max_cost), ("max_tokens_total", max_tokens_total)):
            if bound is not None and bound <= 0:
                raise InvalidArgument(name, f"must be above 0, got {bound!r}")
        self._find_price = find_price
        self._ready = price is not None
        self._price = price
        self._max_cost = max_cost
        self._max_tokens = max_tokens_total
        self._lock = threading.Lock()
        self._held_tokens = 0
        self._held_cost = 0.0
        self.usage = Usage()
        self._cost = 0.0

    @property
    def cost(self) -> float | None:
        """US dollars spent so far; None if the price is unknown."""
        return self._cost if self._price is not None else None

    @property
    def bounded(self) -> bool:
        """Whether there is a bound to keep."""
        return self._max_cost is not None or self._max_tokens is not None

    async def ready(self) -> None:
        """Look the price up, once.

        Raises:
            InvalidArgument: there is a bound on the cost, and the price is unknown.
        """
        if not self._ready:
            self._price = await asyncio.to_thread(self._find_price)
            self._ready = True
        if self._max_cost is not None and self._price is None:
            raise InvalidArgument(
                "max_cost",
                "the price of this model is unknown: give price=(dollars for a million tokens of "
                "prompt, of answer), or install asyncsgl[prices]",
            )

    def hold(self, most: Usage) -> Hold:
        """Set aside what a call may cost.

        Raises:
            BudgetExceeded: that could pass the bound; nothing is set aside.
        """
        if not self.bounded:
            return _FREE
        written = replace(most, cache_write_tokens=most.prompt_tokens)  # that may cost more
        cost = max(map(self._price, (most, written))) if self._price is not None else 0.0
        with self._lock:
            self._check(most.total_tokens, cost)
            self._held_tokens += most.total_tokens
            self._held_cost += cost
        return Hold(most.total_tokens, cost)

    def _check(self, tokens: int, cost: float) -> None:
        used = self.usage.total_tokens + self._held_tokens
        if self._max_tokens is not None and used + tokens > self._max_tokens:
            raise BudgetExceeded(
                f"max_tokens_total={self._max_tokens:,}: {used:,} tokens are used or set aside, "
                f"and the next call may use {tokens:,}; it was not sent"
            )
        spent = self._cost + self._held_cost
        if self._max_cost is not None and spent + cost > self._max_cost:
            raise BudgetExceeded(
                f"max_cost=${self._max_cost:g}: ${spent:.6f} is spent or set aside, "
                f"and the next call may cost ${cost:.6f}; it was not sent"
            )

    def settle(self, hold: Hold, usage: Usage | None) -> None:
        """The call has ended; ``usage`` is None if it cost nothing that is known."""
        with self._lock:
            self._held_tokens -= hold.tokens
            self._held_cost -= hold.cost
            if usage is not None:
                self.usage += usage
                if self._price is not None:
                    self._cost += self._price(usage)
