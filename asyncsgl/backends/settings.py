"""What every provider's backend takes besides its own parameters."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from ..errors import InvalidArgument
from .limits import MAX_ADAPTIVE, Concurrency

__all__ = ["Settings"]

_CONNECTIONS = 1000
"""Connections where nothing is said of calls at once: what a process may open by default."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every provider's backend takes besides its own parameters.

    Args:
        timeout: seconds without a sign of life after which a call is given up.
        max_retries: tries after the first, see :class:`RetryPolicy`.
        deadline: seconds for all tries of one call; None for no end.
        rpm: requests a minute; the limits hold for all backends of this process that share
            provider, key and model.
        tpm: tokens a minute.
        concurrency: calls at once; ``"auto"`` finds out how many the provider bears.
        max_cost: US dollars that this backend may spend.
        max_tokens_total: tokens that this backend may use.
        price: US dollars for a million tokens of prompt and of answer, where they are not
            known.
        max_reasks: how often to ask again for an answer of the form that was asked for.
        drop_params: leave out what the model does not take, and say so in the variable's
            meta, instead of refusing it.

    Raises:
        InvalidArgument: a value is out of its range.
    """

    timeout: float = 600.0
    max_retries: int = 4
    deadline: float | None = 600.0
    rpm: float | None = None
    tpm: float | None = None
    concurrency: Concurrency = None
    max_cost: float | None = None
    max_tokens_total: int | None = None
    price: tuple[float, float] | None = None
    max_reasks: int = 2
    drop_params: bool = False

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise InvalidArgument("timeout", f"must be above 0, got {self.timeout!r}")
        if self.max_reasks < 0:
            raise InvalidArgument("max_reasks", f"must be 0 or more, got {self.max_reasks!r}")

    @property
    def connections(self) -> int:
        """How many connections there may be: one for each call that may be under way."""
        if self.concurrency is None:
            return _CONNECTIONS
        return MAX_ADAPTIVE if isinstance(self.concurrency, str) else self.concurrency

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> Self:
        """The settings among a constructor's keywords, which are taken out of them."""
        names = [field.name for field in fields(cls) if field.name in arguments]
        return cls(**{name: arguments.pop(name) for name in names})
