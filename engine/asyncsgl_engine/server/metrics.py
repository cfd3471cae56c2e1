"""Counters and histograms for Prometheus, by SGLang's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..config import ResolvedConfig
from ..request import Finish
from ..statistics import Statistics

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_TOKENS = tuple(float(2**power) for power in range(16))

Snapshot = Callable[[], tuple[Statistics, ResolvedConfig] | None]


class Metrics:
    """What `/metrics` shows.

    Args:
        model: the label `model_name`.
        snapshot: the engine's counters and settings; None before it is started.
        throughput: tokens drawn a second, lately.
    """

    def __init__(self, model: str, snapshot: Snapshot, throughput: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(model, snapshot, throughput))
        self._model = model
        self._requests = Counter(
            "sglang:num_requests",
            "Requests that ended.",
            ("model_name", "is_streaming"),
            registry=self._registry,
        )
        self._refused = Counter(
            "sglang:num_refused_requests",
            "Requests that were refused, by status.",
            ("model_name", "status"),
            registry=self._registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "To the first token.")
        self._gap = self._histogram(
            "inter_token_latency_seconds", "Between chunks of a stream, by token.", _GAPS
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean over a request.", _GAPS
        )
        self._total = self._histogram("e2e_request_latency_seconds", "From arrival to end.")
        self._queue = self._histogram("queue_time_seconds", "From arrival to the first step.")
        self._prompt = self._histogram("prompt_tokens_histogram", "Prompt tokens.", _TOKENS)
        self._output = self._histogram("generation_tokens_histogram", "Output tokens.", _TOKENS)
        self._uncached = self._histogram(
            "uncached_prompt_tokens_histogram", "Prompt tokens not found in the cache.", _TOKENS
        )

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        made = Histogram(
            f"sglang:{name}", about, ("model_name",), registry=self._registry, buckets=buckets
        )
        return made.labels(self._model)

    def finished(self, finish: Finish, streaming: bool) -> None:
        """Count a request that ended."""
        self._requests.labels(self._model, str(streaming).lower()).inc()
        self._queue.observe(finish.queue_s)
        self._total.observe(finish.total_s)
        self._prompt.observe(finish.prompt_tokens)
        self._uncached.observe(finish.prompt_tokens - finish.cached_tokens)
        self._output.observe(finish.completion_tokens)
        if finish.completion_tokens:
            self._first.observe(finish.ttft_s)
        if finish.completion_tokens > 1:
            decoding = finish.total_s - finish.ttft_s
            self._per_token.observe(decoding / (finish.completion_tokens - 1))

    def gap(self, seconds: float, tokens: int) -> None:
        """Count the time between two chunks of a stream."""
        for _ in range(tokens):
            self._gap.observe(seconds / tokens)

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """The engine's own counters, read when they are asked for."""

    def __init__(self, model: str, snapshot: Snapshot, throughput: Callable[[], float]) -> None:
        self._model = model
        self._snapshot = snapshot
        self._throughput = throughput

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment; none before the engine is started."""
        found = self._snapshot()
        if found is None:
            return
        statistics, config = found
        speed = ("gen_throughput", self._throughput(), "Tokens drawn in the last second.")
        for name, value, about in (*_gauges(statistics, config), speed):
            gauge = GaugeMetricFamily(f"sglang:{name}", about, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
        for name, value, about in _counters(statistics):
            counter = CounterMetricFamily(f"sglang:{name}", about, labels=("model_name",))
            counter.add_metric((self._model,), value)
            yield counter
        cached = CounterMetricFamily(
            "sglang:cached_tokens",
            "Prompt tokens found in the cache.",
            labels=("model_name", "cache_source"),
        )
        cached.add_metric((self._model, "device"), statistics.cached_tokens)
        yield cached


def _gauges(now: Statistics, config: ResolvedConfig) -> list[tuple[str, float, str]]:
    size = config.page_size
    used = now.pages_held * size
    return [
        ("num_running_reqs", now.running, "Requests in the batch."),
        ("num_queue_reqs", now.waiting, "Requests that wait."),
        ("num_used_tokens", used, "Tokens whose pages running requests hold."),
        ("kv_used_tokens", used, "Tokens whose pages running requests hold."),
        ("kv_available_tokens", now.pages_free * size, "Tokens free pages have room for."),
        ("kv_evictable_tokens", now.pages_cached * size, "Tokens only the prefix cache holds."),
        ("token_usage", now.pages_held / now.pages_total, "Share of the cache that is held."),
        ("max_total_num_tokens", now.pages_total * size, "Tokens the cache has room for."),
        ("page_size", size, "Tokens a page."),
        ("num_pages", now.pages_total, "Pages of the cache."),
        ("context_len", config.context_length, "Tokens of a sequence at most."),
        ("cache_hit_rate", now.cache_hit_rate, "Share of prompt tokens found in the cache."),
        ("utilization", now.running / config.max_running_requests, "Share of places taken."),
        ("kv_cache_memory_usage_gb", config.kv_bytes / 2**30, "Memory of the cache in GiB."),
    ]


def _counters(now: Statistics) -> list[tuple[str, float, str]]:
    return [
        ("prompt_tokens", now.prompt_tokens, "Prompt tokens of all requests that ran."),
        ("generation_tokens", now.generated_tokens, "Tokens drawn."),
        ("num_aborted_requests", now.aborted, "Requests that were aborted."),
        ("num_failed_requests", now.failed, "Requests that ended with an error."),
        ("num_retracted_requests", now.preemptions, "Times a request lost its pages."),
        ("forward_execution_seconds", now.busy_s, "Seconds spent in steps."),
        ("num_steps", now.steps, "Forward passes."),
    ]
