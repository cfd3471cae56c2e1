"""Everything at once, for long: pages and memory stay flat and the books agree."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.errors import InvalidRequest, Overloaded
from asyncsgl_engine.request import Completion, Delta, Request, Sampling

from .mix import Mix, assert_fits

pytestmark = [pytest.mark.anyio]

SECONDS = float(os.environ.get("ASYNCSGL_SOAK_SECONDS", "1800"))
CLIENTS = 24
CAPACITY = 600
PAGE = os.sysconf("SC_PAGE_SIZE")
SETTINGS: list[dict[str, Any]] = [
    {"page_size": 4, "chunked_prefill_size": 64, "max_running_requests": 16},
    {"page_size": 16, "chunked_prefill_size": 7, "max_running_requests": 5},
    {"page_size": 1, "chunked_prefill_size": 33, "disable_radix_cache": True},
    {"page_size": 8, "max_running_requests": 9, "disable_overlap_schedule": False},
]
Known = dict[Request, tuple[int, ...]]
Act = Callable[[Mix, random.Random], Coroutine[Any, Any, str]]


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def known_answers(folder: Path) -> Known:
    """Greedy answers of transformers, which no crowd around a request may change."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chance = random.Random("known")
    known: Known = {}
    for number in range(12):
        prompt = tuple(chance.randrange(256) for _ in range(chance.randint(1, 120)))
        ids = torch.tensor([prompt])
        sampling = Sampling(max_new_tokens=20, temperature=0.0, ignore_eos=True)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        known[Request(f"known-{number}", prompt, sampling)] = tuple(out[0, len(prompt) :].tolist())
    return known


class Crowd:
    """Clients of one engine, and what happened to them.

    Args:
        engine: running.
        known: requests whose tokens are known.
    """

    def __init__(self, engine: AsyncEngine, known: Known) -> None:
        self.engine = engine
        self.ends: Counter[str] = Counter()
        self._known = list(known.items())
        self._names = 0

    def name(self) -> str:
        self._names += 1
        return f"r{self._names}"

    async def client(self, chance: random.Random, visits: int) -> None:
        """One after another, requests of any kind."""
        mix = Mix(chance, CAPACITY // 2)
        acts: list[Act] = [self.ask, self.ask, self.siblings, self.leave, self.cancel, self.abort]
        acts += [self.check_known, self.check_known, self.score, self.refuse]
        for _ in range(visits):
            act = chance.choice(acts)
            try:
                self.ends[await act(mix, chance)] += 1
            except Overloaded:
                self.ends["overloaded"] += 1

    async def ask(self, mix: Mix, _: random.Random) -> str:
        request = mix.request(self.name())
        answer = await self.answer(request)
        assert_fits(request, answer)
        return answer.finish.reason

    async def answer(self, request: Request) -> Completion:
        """The answer, put together from its deltas where it is streamed."""
        if not request.stream:
            return await self.engine.generate(request)
        deltas = [delta async for delta in self.engine.stream(request)]
        return joined(request, deltas)

    async def siblings(self, mix: Mix, _: random.Random) -> str:
        requests = mix.siblings(self.name())
        answers = await asyncio.gather(
            *(self.answer(request) for request in requests), return_exceptions=True
        )
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, Completion):
                assert_fits(request, answer)
            elif not isinstance(answer, Overloaded):
                raise answer
        return "siblings"

    async def leave(self, mix: Mix, chance: random.Random) -> str:
        """Stop reading a stream early."""
        stream = self.engine.stream(mix.request(self.name()))
        left = chance.randint(0, 5)
        async for _ in stream:
            left -= 1
            if left <= 0:
                break
        await stream.aclose()
        return "left"

    async def cancel(self, mix: Mix, chance: random.Random) -> str:
        task = asyncio.ensure_future(self.engine.generate(mix.request(self.name())))
        for _ in range(chance.randint(0, 30)):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return "cancelled"

    async def abort(self, mix: Mix, chance: random.Random) -> str:
        """End a request by its name, from a thread."""
        request = mix.request(self.name())
        task = asyncio.ensure_future(self.engine.generate(request))
        await asyncio.sleep(chance.choice([0.0, 0.005]))
        await asyncio.to_thread(self.engine.abort, request.request_id)
        assert_fits(request, await task)
        return "aborted"

    async def check_known(self, _: Mix, chance: random.Random) -> str:
        known, tokens = chance.choice(self._known)
        request = Request(
            self.name(), known.prompt_ids, known.sampling, priority=chance.choice([0, 3])
        )
        answer = await self.engine.generate(request)
        assert answer.token_ids == tokens
        return "known"

    async def score(self, _: Mix, chance: random.Random) -> str:
        prefix = [chance.randrange(256) for _ in range(chance.randint(1, 40))]
        choices = [[chance.randrange(256)] * chance.randint(1, 3) for _ in range(3)]
        scores = await self.engine.score(prefix, choices)
        assert [len(score) for score in scores] == [len(choice) for choice in choices]
        return "scored"

    async def refuse(self, _: Mix, chance: random.Random) -> str:
        """What can never run is told so."""
        prompt = chance.choice([(1, 10**6), (5,) * (CAPACITY + 9)])
        with pytest.raises(InvalidRequest):
            await self.engine.generate(Request(self.name(), prompt))
        return "refused"


def joined(request: Request, deltas: list[Delta]) -> Completion:
    """A streamed answer as a whole."""
    finish = deltas[-1].finish
    assert finish is not None
    return Completion(
        request.request_id,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        finish,
    )


async def assert_flat(engine: AsyncEngine, flush: bool) -> None:
    """Nothing runs: all pages are free or cached, and a flush frees the rest."""
    await engine.check()
    now = engine.statistics()
    assert (now.running, now.waiting, now.pages_held) == (0, 0, 0)
    assert now.pages_free + now.pages_cached == now.pages_total
    if flush:
        assert await engine.flush_cache(wait=True)
        now = engine.statistics()
        assert (now.pages_free, now.pages_cached) == (now.pages_total, 0)


async def live(engine: AsyncEngine, known: Known, seconds: float, seed: str) -> list[float]:
    """Rounds of a crowd, each to its end; the memory after each, in MiB."""
    crowd = Crowd(engine, known)
    chance = random.Random(seed)
    idle = len(asyncio.all_tasks())
    memory: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or not memory:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(crowd.client(random.Random(chance.random()), visits=8))
            for _ in range(3):  # while requests run it is refused, or does no harm
                await asyncio.sleep(chance.uniform(0.0, 0.2))
                await engine.flush_cache()
        await assert_flat(engine, flush=chance.random() < 0.3)
        assert len(asyncio.all_tasks()) == idle
        gc.collect()
        memory.append(resident_mib())
    now = engine.statistics()
    print(
        f"\n{len(memory)} rounds, {dict(sorted(crowd.ends.items()))}; {now.steps} steps, "
        f"{now.preemptions} preempted, hit rate {now.cache_hit_rate:.0%}; "
        f"{memory[0]:.0f} MiB at first, {memory[len(memory) // 3]:.0f} after a third, "
        f"{memory[-1]:.0f} at last"
    )
    return memory


def config_of(folder: Path, settings: dict[str, Any]) -> EngineConfig:
    return EngineConfig(
        model_path=str(folder),
        dtype="float32",
        max_total_tokens=CAPACITY,
        max_queued_requests=40,
        debug_check=True,
        **settings,
    )


async def outlive(folder: Path, settings: dict[str, Any], seconds: float) -> list[float]:
    """A whole life of an engine; nothing of it is left."""
    known = known_answers(folder)
    async with AsyncEngine(config_of(folder, settings)) as engine:
        memory = await live(engine, known, seconds, str(settings))
        if seconds:
            assert engine.statistics().preemptions > 0
    assert not [t for t in threading.enumerate() if t.name.startswith("asyncsgl-engine")]
    return memory


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_a_long_life_costs_nothing(
    model_folder: Callable[[str], Path], settings: dict[str, Any]
) -> None:
    memory = await outlive(model_folder("llama"), settings, SECONDS / len(SETTINGS))
    third = len(memory) // 3
    assert max(memory[-third:]) < max(memory[third // 2 : third + 1]) + 30


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.timeout(60)
async def test_a_round_of_everything_leaves_nothing_behind(
    model_folder: Callable[[str], Path], settings: dict[str, Any]
) -> None:
    await outlive(model_folder("llama"), settings, seconds=0.0)
