"""Greedy tokens equal transformers' `generate`, whatever happens around a request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.request import Request, Sampling

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

MODELS = ["llama", "qwen2", "gpt2"]


class Oracle:
    """transformers' own greedy answers."""

    def __init__(self, folder: Path) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )

    def __call__(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        ids = torch.tensor([prompt])
        out = self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return tuple(out[0, len(prompt) :].tolist())


def workload(draw: random.Random, count: int) -> list[Request]:
    """Prompts of random lengths; half of them begin with pieces of the same text."""
    common = [draw.randrange(256) for _ in range(120)]
    requests = []
    for number in range(count):
        shared = common[: draw.choice([0, 0, 5, 30, 100])]
        own = [draw.randrange(256) for _ in range(draw.randrange(1, 60))]
        sampling = Sampling(max_new_tokens=draw.randrange(1, 24), temperature=0.0, ignore_eos=True)
        requests.append(
            Request(f"r{number}", (*shared, *own), sampling, stream=draw.random() < 0.5)
        )
    return requests


async def arrive(engine: AsyncEngine, request: Request, wait: int) -> tuple[int, ...]:
    """Start after so many turns of the loop, so that arrivals mix with steps."""
    for _ in range(wait):
        await asyncio.sleep(0.001)
    return (await engine.generate(request)).token_ids


async def give_up(engine: AsyncEngine, request: Request, after: int) -> None:
    """Take a few deltas, then leave."""
    stream = engine.stream(request)
    async for delta in stream:
        after -= len(delta.token_ids)
        if after <= 0:
            break
    await stream.aclose()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("page_size", "chunk", "tokens", "slots", "shares"),
    [
        (1, 512, 4000, 32, True),
        (16, 7, 4000, 32, True),
        (16, 64, 400, 8, True),
        (4, 50, 260, 16, True),
        (64, 512, 4000, 4, True),
        (16, 33, 300, 16, False),
    ],
)
async def test_greedy_tokens_equal_generate(
    kind: str,
    page_size: int,
    chunk: int,
    tokens: int,
    slots: int,
    shares: bool,
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder(kind)
    draw = random.Random(f"{kind}{page_size}{chunk}")
    requests = workload(draw, 20)
    config = EngineConfig(
        model_path=str(folder),
        dtype="float32",
        page_size=page_size,
        chunked_prefill_size=chunk,
        max_total_tokens=tokens,
        max_running_requests=slots,
        disable_radix_cache=not shares,
        enable_native=page_size != 16,
        debug_check=True,
    )
    async with AsyncEngine(config) as engine:
        async with asyncio.TaskGroup() as group:
            answers = [
                group.create_task(arrive(engine, request, draw.randrange(30)))
                for request in requests
            ]
            for number in range(6):
                prompt = requests[number].prompt_ids
                endless = Sampling(max_new_tokens=60, temperature=0.0, ignore_eos=True)
                leaver = Request(f"leaver{number}", prompt, endless, stream=True)
                group.create_task(give_up(engine, leaver, draw.randrange(1, 9)))
        await engine.check()
        statistics = engine.statistics()
        assert statistics.pages_held == 0
        assert statistics.pages_free + statistics.pages_cached == statistics.pages_total
        if shares:
            assert statistics.cached_tokens > 0
    oracle = await asyncio.to_thread(Oracle, folder)
    for request, answer in zip(requests, answers, strict=True):
        count = request.sampling.max_new_tokens
        expected = await asyncio.to_thread(oracle, request.prompt_ids, count)
        assert answer.result() == expected


@pytest.mark.parametrize("native", [True, False])
async def test_preempted_sequences_go_on_as_if_nothing_had_happened(
    native: bool, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder("llama")
    config = EngineConfig(
        model_path=str(folder),
        dtype="float32",
        page_size=4,
        max_total_tokens=120,
        enable_native=native,
        debug_check=True,
    )
    growing = Sampling(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    requests = [Request(f"r{n}", (n, 7, n * 5), growing) for n in range(10)]
    async with AsyncEngine(config) as engine:
        # All are handed over before the first step can end, and they outgrow the pages by far.
        answers = await asyncio.gather(*map(engine.generate, requests))
        preemptions = engine.statistics().preemptions
    assert preemptions > 0
    assert sum(answer.finish.retractions for answer in answers) == preemptions
    oracle = await asyncio.to_thread(Oracle, folder)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.token_ids == await asyncio.to_thread(oracle, request.prompt_ids, 40)


async def test_the_default_model_too() -> None:
    config = EngineConfig(dtype="float32", max_total_tokens=4096, chunked_prefill_size=48)
    draw = random.Random(4)
    requests = [
        Request(
            f"r{number}",
            tuple(draw.randrange(2000, 40_000) for _ in range(draw.randrange(1, 40))),
            Sampling(max_new_tokens=8, temperature=0.0, ignore_eos=True),
        )
        for number in range(5)
    ]
    async with AsyncEngine(config) as engine:
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
    from asyncsgl_engine.hub import resolve_model

    found = await asyncio.to_thread(resolve_model, config.model_path)
    oracle = await asyncio.to_thread(Oracle, found.path)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.token_ids == await asyncio.to_thread(oracle, request.prompt_ids, 8)
