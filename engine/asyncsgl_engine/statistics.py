"""A snapshot of what the engine is doing and has done."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters since the start and gauges of this moment.

    Args:
        pages_total: pages of the KV cache.
        pages_free: pages nobody holds.
        pages_cached: pages only the prefix cache holds; they make room when needed.
        pages_held: pages running sequences hold.
        waiting: requests in the queue.
        compiling: those of them whose grammar is being compiled.
        running: requests with a place in the batch.
        finished: requests that ended well.
        aborted: requests that were cancelled.
        failed: requests that ended with an error.
        preemptions: times a sequence lost its pages to others.
        steps: forward passes.
        prompt_tokens: prompt tokens of all requests that ran.
        cached_tokens: those of them that were found in the cache.
        generated_tokens: tokens drawn.
        computed_tokens: tokens that went through the model.
        busy_s: seconds spent in steps.
    """

    pages_total: int
    pages_free: int
    pages_cached: int
    pages_held: int
    waiting: int
    compiling: int
    running: int
    finished: int
    aborted: int
    failed: int
    preemptions: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    computed_tokens: int
    busy_s: float

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens found in the cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn per second of work."""
        return self.generated_tokens / self.busy_s if self.busy_s else 0.0
