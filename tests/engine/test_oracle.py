"""Tokens equal those of transformers, whatever happens around a request.

Greedy ones equal its `generate`; drawn ones are what its logits processors say at the chance that
a seed gives. In bfloat16, where sums in another order round differently, logits are as near to
those in float32 as transformers' own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.hub import resolve_model
from asyncsgl_engine.request import Completion, Request, Sampling
from tests.engine.expected import Oracle

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

MODELS = ["llama", "qwen2", "gpt2"]


def config_for(folder: Path, **settings: Any) -> EngineConfig:
    sizes: dict[str, Any] = {"max_total_tokens": 4000, "dtype": "float32", "debug_check": True}
    return EngineConfig(model_path=str(folder), **(sizes | settings))


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


async def arrive(engine: AsyncEngine, request: Request, wait: int) -> Completion:
    """Start after so many turns of the loop, so that arrivals mix with steps."""
    for _ in range(wait):
        await asyncio.sleep(0.001)
    return await engine.generate(request)


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
    oracle = await asyncio.to_thread(Oracle.load, folder)
    for request, answer in zip(requests, answers, strict=True):
        count = request.sampling.max_new_tokens
        expected = await asyncio.to_thread(oracle.generate, request.prompt_ids, count)
        assert answer.result().token_ids == expected


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("native", [True, False])
async def test_preempted_sequences_go_on_as_if_nothing_had_happened(
    kind: str, native: bool, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(kind)
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
    oracle = await asyncio.to_thread(Oracle.load, folder)
    for request, answer in zip(requests, answers, strict=True):
        expected = await asyncio.to_thread(oracle.generate, request.prompt_ids, 40)
        assert answer.token_ids == expected


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("page_size", [16, 64])
async def test_answers_to_one_prompt_and_forks_begin_in_copies_of_half_a_page(
    kind: str, page_size: int, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(kind)
    draw = random.Random(page_size)
    prompt = tuple(draw.randrange(256) for _ in range(4 * page_size + page_size // 2))
    greedy = Sampling(max_new_tokens=page_size - 1, temperature=0.0, ignore_eos=True)
    async with AsyncEngine(config_for(folder, page_size=page_size)) as engine:
        first = await engine.generate(Request("first", prompt, greedy))
        trunk = prompt + first.token_ids
        asked = [Request(f"again{n}", prompt, greedy) for n in range(3)]
        asked += [Request(f"fork{n}", (*trunk[:-2], n, 3), greedy) for n in range(4)]
        answers = await asyncio.gather(*map(engine.generate, asked))
        await engine.check()
    oracle = await asyncio.to_thread(Oracle.load, folder)
    assert first.token_ids == await asyncio.to_thread(oracle.generate, prompt, page_size - 1)
    for request, answer in zip(asked, answers, strict=True):
        expected = await asyncio.to_thread(oracle.generate, request.prompt_ids, page_size - 1)
        assert answer.token_ids == expected
        # All that is known but the last token, though it ends in the middle of a page.
        known = len(prompt) - 1 if request.prompt_ids == prompt else len(trunk) - 2
        assert answer.finish.cached_tokens == known
        assert known % page_size


def mixed(draw: random.Random, output: int) -> list[Request]:
    """Rows of all settings, several of them alike but for one thing, some with one prompt."""
    plain = Sampling(max_new_tokens=output, temperature=0.0, ignore_eos=True)
    drawn = replace(plain, temperature=1.0, seed=11)
    biases = ((5, 3.5), (70, -4.0), (200, 2.0))
    settings = [
        plain,
        replace(plain, frequency_penalty=0.7, presence_penalty=-0.4),
        replace(plain, repetition_penalty=1.5),
        replace(plain, logit_bias=biases),
        replace(plain, ignore_eos=False, min_new_tokens=5, stop_token_ids=tuple(range(0, 250, 3))),
        replace(plain, top_k=1, temperature=2.0, seed=3),
        drawn,
        replace(drawn, seed=-(2**40)),
        replace(drawn, temperature=2.5, seed=2**63),
        replace(drawn, temperature=8.0, top_p=0.8),
        replace(drawn, temperature=8.0, top_k=20),
        replace(drawn, temperature=8.0, min_p=0.3),
        replace(drawn, temperature=9.0, top_k=60, top_p=0.9, min_p=0.1, seed=0),
        replace(drawn, temperature=6.0, repetition_penalty=0.8, frequency_penalty=1.2, top_p=0.9),
        replace(drawn, temperature=4.0, logit_bias=biases, presence_penalty=2.0),
        replace(drawn, temperature=4.0, min_new_tokens=6, stop_token_ids=tuple(range(0, 250, 3))),
        replace(drawn, temperature=4.0, top_k=9, stop=("z", "e"), ignore_eos=False),
    ]
    stem = tuple(draw.randrange(256) for _ in range(40))
    requests = []
    for number, sampling in enumerate(settings):
        own = tuple(draw.randrange(256) for _ in range(draw.randrange(1, 30)))
        prompt = (*stem[: draw.choice([0, 13, 40])], *own)
        request = Request(f"mixed{number}", prompt, sampling, stream=draw.random() < 0.5)
        if number % 3 == 0:
            request = replace(
                request,
                return_logprob=True,
                logprob_start_len=draw.choice([-1, 0, len(prompt) - 1, len(prompt) // 2]),
                top_logprobs_num=draw.choice([0, 1, 7]),
                token_ids_logprob=draw.choice([(), (9,), (299, 0, 17)]),
            )
        requests.append(request)
    for number in range(4):  # as `n=4` asks for them
        one = replace(drawn, temperature=3.0, seed=100 + number)
        requests.append(Request(f"n{number}", stem, one, return_logprob=number == 2))
    return requests


@pytest.mark.parametrize(
    ("kind", "native", "page_size", "tokens"),
    [
        ("llama", True, 16, 4000),
        ("llama", False, 1, 700),
        ("llama", True, 4, 200),
        ("qwen2", True, 64, 4000),
        ("qwen2", False, 4, 200),
        ("gpt2", True, 4, 200),
        ("gpt2", False, 16, 4000),
    ],
)
async def test_rows_of_all_settings_get_what_each_gets_alone(
    kind: str, native: bool, page_size: int, tokens: int, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(kind)
    draw = random.Random(f"{kind}{page_size}")
    requests = mixed(draw, output=30)
    settings = {"page_size": page_size, "enable_native": native}
    config = config_for(folder, max_total_tokens=tokens, chunked_prefill_size=30, **settings)
    async with AsyncEngine(config) as engine:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(arrive(engine, request, draw.randrange(12)))
                for request in requests
            ]
            for number, request in enumerate(mixed(draw, output=40)[::2]):
                leaver = replace(request, request_id=f"leaver{number}", stream=True)
                group.create_task(give_up(engine, leaver, draw.randrange(1, 9)))
        await engine.check()
        assert engine.statistics().pages_held == 0
        if tokens == 200:
            assert engine.statistics().preemptions > 0
        ends = sorted(engine.tokenizer.eos_token_ids)
    together = [task.result() for task in tasks]
    async with AsyncEngine(config_for(folder, disable_radix_cache=True, **settings)) as engine:
        alone = [await engine.generate(request) for request in requests]
    oracle = await asyncio.to_thread(Oracle.load, folder)
    for request, answer, single in zip(requests, together, alone, strict=True):
        assert answer.token_ids == single.token_ids
        assert answer.text == single.text
        assert (answer.finish.reason, answer.finish.matched) == (
            single.finish.reason,
            single.finish.matched,
        )
        await asyncio.to_thread(oracle.check_tokens, request, answer, ends)
        await asyncio.to_thread(oracle.check_logprobs, request, answer)
    plain = await asyncio.to_thread(oracle.generate, requests[0].prompt_ids, 30)
    assert together[0].token_ids == plain
    stopped = [answer.finish.reason == "stop" for answer in together]
    assert any(stopped)
    assert len({answer.token_ids for answer in together[-4:]}) == 4


async def test_the_oracle_notices_what_is_wrong(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    drawn = Sampling(max_new_tokens=6, temperature=4.0, top_p=0.9, seed=5, ignore_eos=True)
    request = Request("r", (1, 2, 3), drawn, return_logprob=True, logprob_start_len=0)
    async with AsyncEngine(config_for(folder)) as engine:
        answer = await engine.generate(request)
    oracle = await asyncio.to_thread(Oracle.load, folder)
    oracle.check_tokens(request, answer)
    oracle.check_logprobs(request, answer)
    for wrong in (
        replace(drawn, seed=6),
        replace(drawn, temperature=2.0),
        replace(drawn, top_p=1.0),
        replace(drawn, logit_bias=((answer.token_ids[0], -3.0),)),
        replace(drawn, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=2.0),
    ):
        with pytest.raises(AssertionError):
            oracle.check_tokens(replace(request, sampling=wrong), answer)
    other = replace(answer, logprobs=answer.logprobs[::-1])
    with pytest.raises(AssertionError):
        oracle.check_logprobs(request, other)


@pytest.mark.parametrize("kind", MODELS)
async def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    """Prompts in chunks, with prefixes from the cache, and answers; every logit that is named."""
    folder = model_folder(kind)
    requests = [
        replace(
            request,
            sampling=replace(request.sampling, max_new_tokens=12),
            return_logprob=True,
            logprob_start_len=number % 2 - 1,  # a prompt that is scored is computed
            token_ids_logprob=tuple(range(0, 300, 7)),
        )
        for number, request in enumerate(workload(random.Random(kind), 16))
    ]
    config = config_for(folder, dtype="bfloat16", chunked_prefill_size=37)
    async with AsyncEngine(config) as engine:
        answers = await asyncio.gather(*map(engine.generate, requests))
        assert engine.statistics().cached_tokens > 0
    exact = await asyncio.to_thread(Oracle.load, folder)
    rounded = await asyncio.to_thread(Oracle.load, folder, torch.bfloat16)
    ours, theirs = [], []
    for request, answer in zip(requests, answers, strict=True):
        whole = request.prompt_ids + answer.token_ids
        entries = (*answer.prompt_logprobs[1:], *answer.logprobs)
        told = slice(len(whole) - 1 - len(entries), -1)
        known, other = (o.logits(whole).log_softmax(-1)[told] for o in (exact, rounded))
        found = torch.tensor([[value for _, value in entry.chosen] for entry in entries])
        columns = list(request.token_ids_logprob)
        ours.append((found - known[:, columns]).flatten())
        theirs.append((other - known)[:, columns].flatten())
    own, reference = (torch.cat(errors).square().mean().sqrt() for errors in (ours, theirs))
    assert 0.0 < own < 1.1 * reference


@pytest.fixture(scope="module")
def default_answers() -> tuple[list[Request], list[tuple[int, ...]]]:
    """Requests for the default model, some of which share a prefix, and its greedy answers."""
    draw = random.Random(4)
    common = [draw.randrange(2000, 40_000) for _ in range(70)]
    requests = []
    for number in range(6):
        own = [draw.randrange(2000, 40_000) for _ in range(draw.randrange(1, 40))]
        prompt = (*common[: draw.choice([0, 20, 70])], *own)
        greedy = Sampling(max_new_tokens=8, temperature=0.0, ignore_eos=True)
        requests.append(Request(f"r{number}", prompt, greedy))
    oracle = Oracle.load(resolve_model(EngineConfig().model_path).path)
    return requests, [oracle.generate(request.prompt_ids, 8) for request in requests]


@pytest.mark.parametrize("page_size", [1, 16, 64])
async def test_the_default_model_too(
    page_size: int, default_answers: tuple[list[Request], list[tuple[int, ...]]]
) -> None:
    requests, expected = default_answers
    config = EngineConfig(
        dtype="float32", page_size=page_size, max_total_tokens=1024, chunked_prefill_size=48
    )
    heated = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    async with AsyncEngine(config) as engine, asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.generate(request)) for request in requests]
        for number, request in enumerate(requests[:3]):
            mate = replace(request, request_id=f"mate{number}", sampling=heated, stream=True)
            group.create_task(give_up(engine, mate, 4))
    assert [task.result().token_ids for task in tasks] == expected
