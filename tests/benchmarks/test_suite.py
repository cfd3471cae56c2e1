"""The programs of the benchmark run everywhere, and no cache beats the best one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import asyncsgl as sgl
from benchmarks.suite.measuring import run_case
from benchmarks.suite.programs import CASES
from benchmarks.suite.sides import Side, local

from ..engine.conftest import byte_tokenizer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def sides(tmp_path: Path) -> AsyncIterator[list[Side]]:
    """A tiny model with and without its prefix cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=0.5,
        bos_token_id=256,
        eos_token_id=257,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    byte_tokenizer().save_pretrained(tmp_path)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                local(name, str(tmp_path), "float32", threads=1, cache=cache)
            )
            for name, cache in (("on", True), ("off", False))
        ]


@pytest.mark.timeout(120)
async def test_programs_give_the_same_text_with_and_without_a_cache(sides: list[Side]) -> None:
    on, off = sides
    assert isinstance(on.backend, sgl.Runtime)
    encode = (await asyncio.to_thread(on.backend.get_tokenizer)).encode
    for case in CASES.values():
        saved = await run_case(case, on, 0.1, "test", encode)
        plain = await run_case(case, off, 0.1, "test", encode)
        assert saved.texts == plain.texts, case.name
        assert 0 < saved.hit_rate <= saved.best_hit_rate < 1 or len(saved.texts) == saved.calls == 1
        assert saved.best_hit_rate == pytest.approx(plain.best_hit_rate, abs=0.02)
        assert plain.hit_rate == 0.0
        assert saved.prompt_tokens == plain.prompt_tokens > 0
