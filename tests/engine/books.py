"""Resolved settings for tests that need no model."""

from __future__ import annotations

from asyncsgl_engine.config import ModelFacts, ResolvedConfig

__all__ = ["resolved"]


def resolved(
    page_size: int,
    num_pages: int,
    chunk: int,
    slots: int,
    shares: bool = True,
    context: int = 4096,
    vocab: int = 300,
) -> ResolvedConfig:
    """Settings with the sizes that matter to the books."""
    return ResolvedConfig(
        model_path="none",
        model=ModelFacts("None", 1, 1, 1, 8, vocab, context, "float32"),
        device="cpu",
        dtype="float32",
        page_size=page_size,
        num_pages=num_pages,
        kv_bytes=0,
        max_total_tokens=page_size * num_pages,
        max_running_requests=slots,
        chunked_prefill_size=chunk,
        context_length=context,
        max_queued_requests=1000,
        radix_cache=shares,
        random_seed=0,
        debug_check=True,
        num_threads=2,
        native=False,
    )
