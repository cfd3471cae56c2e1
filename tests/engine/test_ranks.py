"""An engine over several processes: the same tokens as over one, and an end for every rank."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.errors import Closed, ConfigError, RankFailed
from asyncsgl_engine.request import Completion, Request, Sampling
from asyncsgl_engine.server import create_app
from asyncsgl_engine.server.settings import ServerSettings
from tests.engine.direct import generate, workload
from tests.engine.mix import Mix, assert_fits

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90)]

FOREVER = Sampling(max_new_tokens=450, temperature=0.0, ignore_eos=True)


def settings(folder: Path, tp_size: int, **more: object) -> EngineConfig:
    asked: dict[str, object] = {
        "page_size": 4,
        "chunked_prefill_size": 24,
        "max_running_requests": 16,
        "max_total_tokens": 1600,
        "debug_check": True,
        "dtype": "float32",
        "device": "cpu",
        **more,
    }
    return EngineConfig(str(folder), tp_size=tp_size, **asked)  # type: ignore[arg-type]


def ranks_of(parent: int) -> set[int]:
    """The processes of this process's ranks that are there, dead ones that nobody waited for too."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parents) == parent and (b"parallel.worker" in command or not command):
            found.add(int(folder.name))
    return found


def wait_for_end(processes: set[int], limit_s: float = 20.0) -> None:
    """Until none of these processes runs."""
    deadline = time.monotonic() + limit_s
    while left := {pid for pid in processes if runs(pid)}:
        assert time.monotonic() < deadline, f"{left} run on"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@dataclass(frozen=True)
class Shared:
    """A model's folder and an engine of several processes over it."""

    folder: Path
    engine: AsyncEngine
    kind: str


@pytest.fixture(scope="module", params=[("llama", 2), ("qwen2", 4)], ids=str)
def shared(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Iterator[Shared]:
    """Llama's two key/value heads for two ranks; Qwen2's one, which four ranks hold alike."""
    kind, size = request.param
    folder = model_folder(kind)
    engine = AsyncEngine(settings(folder, size))
    before = ranks_of(os.getpid())
    asyncio.run(engine.start())
    ranks = ranks_of(os.getpid()) - before
    assert len(ranks) == size - 1
    yield Shared(folder, engine, kind)
    begun = time.monotonic()
    engine.shutdown()
    assert time.monotonic() - begun < 5.0
    assert not ranks & ranks_of(os.getpid())


async def answers(engine: AsyncEngine, requests: list[Request]) -> dict[str, Completion]:
    done = await asyncio.gather(*(engine.generate(request) for request in requests))
    return {answer.request_id: answer for answer in done}


async def give_up(engine: AsyncEngine, request: Request, after: int) -> None:
    """Take so many deltas, then leave."""
    stream = engine.stream(request)
    async for _ in stream:
        after -= 1
        if not after:
            break
    await stream.aclose()


async def test_greedy_tokens_are_those_of_transformers(shared: Shared) -> None:
    """In batches, in chunks, with prefixes found, and with others leaving on the way."""
    requests = workload(16, 90, 16)
    leaving = [
        replace(request, request_id=f"left-{number}", sampling=FOREVER, stream=True)
        for number, request in enumerate(requests[:6])
    ]
    running = [
        asyncio.ensure_future(give_up(shared.engine, request, 1 + number))
        for number, request in enumerate(leaving)
    ]
    found = await answers(shared.engine, requests)
    await asyncio.gather(*running)
    expected = generate(shared.folder, requests)
    assert {name: answer.token_ids for name, answer in found.items()} == expected
    again = await answers(shared.engine, requests)
    assert {name: answer.token_ids for name, answer in again.items()} == expected
    assert sum(answer.finish.cached_tokens for answer in again.values()) > 300
    await shared.engine.check()


async def test_everything_else_is_as_on_one_process(shared: Shared) -> None:
    """Seeds, penalties, stops, grammars and logprobs."""
    mix = Mix(random.Random(8), 100)
    requests = [mix.request(f"r{number}") for number in range(30)]
    requests = [
        replace(request, sampling=replace(request.sampling, seed=number))
        for number, request in enumerate(requests)
    ]
    found = await answers(shared.engine, requests)
    async with AsyncEngine(settings(shared.folder, 1)) as alone:
        expected = await answers(alone, requests)
    kinds = set()
    for request in requests:
        mine, theirs = found[request.request_id], expected[request.request_id]
        assert_fits(request, mine)
        assert mine.token_ids == theirs.token_ids
        assert mine.text == theirs.text
        for entry, other in zip(
            mine.logprobs + mine.prompt_logprobs,
            theirs.logprobs + theirs.prompt_logprobs,
            strict=True,
        ):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-3)
        kinds.add(request.grammar.kind if request.grammar else request.return_logprob)
    assert kinds >= {"regex", "json_schema", "ebnf", True, False}


async def test_choices_are_scored_as_on_one_process(shared: Shared) -> None:
    prefix, choices = tuple(b"Is it so? "), [tuple(b"yes"), tuple(b"no, it is not")]
    found = await shared.engine.score(prefix, choices)
    async with AsyncEngine(settings(shared.folder, 1)) as alone:
        expected = await alone.score(prefix, choices)
    for mine, theirs in zip(found, expected, strict=True):
        assert [entry.logprob for entry in mine] == pytest.approx(
            [entry.logprob for entry in theirs], abs=1e-3
        )


async def test_a_rank_has_its_share_of_the_heads(shared: Shared) -> None:
    config = shared.engine.config
    alone = settings(shared.folder, 1)
    kept = max(1, config.model.num_kv_heads // config.tp_size)
    token = 2 * config.model.num_layers * kept * config.model.head_dim * 4
    assert config.kv_bytes == token * config.max_total_tokens
    assert config.max_total_tokens == alone.max_total_tokens


async def test_bfloat16_and_a_shutdown_while_something_runs(
    model_folder: Callable[[str], Path],
) -> None:
    before = ranks_of(os.getpid())
    folder = model_folder("llama")
    prompts = [tuple(range(begin, begin + 40)) for begin in (1, 50, 100)]
    requests = [
        Request(
            f"r{number}", prompt, Sampling(max_new_tokens=0), return_logprob=True,
            logprob_start_len=1,
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    values: list[list[float]] = []
    for size, dtype in ((1, "float32"), (1, "bfloat16"), (2, "bfloat16")):
        async with AsyncEngine(settings(folder, size, dtype=dtype, enable_native=False)) as engine:
            found = await answers(engine, requests)
            stream = engine.stream(Request("long", (5, 6), FOREVER, stream=True))
            await anext(stream)
            begun = time.monotonic()
            await engine.aclose()
            assert time.monotonic() - begun < 5.0
            with pytest.raises(Closed):
                async for _ in stream:
                    pass
        values.append(
            [e.logprob or 0.0 for answer in found.values() for e in answer.prompt_logprobs]
        )
    exact, alone, cut = values
    errors = [sum(abs(a - b) for a, b in zip(exact, other, strict=True)) for other in (alone, cut)]
    assert errors[1] < 1.5 * errors[0]
    assert ranks_of(os.getpid()) == before


async def statuses(engine: AsyncEngine) -> list[int]:
    """What a server of this engine says of its health and its readiness."""
    transport = httpx.ASGITransport(create_app(engine, ServerSettings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return [(await client.get(path)).status_code for path in ("/health", "/ready")]


# -- the end of a rank ---------------------------------------------------------------------------


async def test_a_killed_rank_ends_what_runs(model_folder: Callable[[str], Path]) -> None:
    before, threads = ranks_of(os.getpid()), torch.get_num_threads()
    engine = AsyncEngine(settings(model_folder("llama"), 2))
    await engine.start()
    [rank] = ranks_of(os.getpid()) - before
    assert await statuses(engine) == [200, 503]  # the server has not begun
    others = [
        asyncio.ensure_future(engine.generate(Request(f"r{number}", (1, 2, number), FOREVER)))
        for number in range(3)
    ]
    stream = engine.stream(Request("seen", (5, 6), FOREVER, stream=True))
    await anext(stream)
    os.kill(rank, signal.SIGKILL)
    words = rf"rank 1 \(process {rank}\) was killed by signal 9 \(SIGKILL\)"
    with pytest.raises(RankFailed, match=words):
        async for _ in stream:
            pass
    for error in await asyncio.gather(*others, return_exceptions=True):
        assert isinstance(error, RankFailed)
        assert str(rank) in str(error)
    with pytest.raises(RankFailed, match=words):  # and it says so from now on
        await engine.generate(Request("late", (1,), FOREVER))
    with pytest.raises(RankFailed, match=words):
        await engine.start()
    assert isinstance(engine.fault, RankFailed)
    assert await statuses(engine) == [503, 503]
    await engine.aclose()
    assert not {rank} & ranks_of(os.getpid())
    assert engine.statistics().failed >= 4
    assert torch.get_num_threads() == threads


async def test_a_rank_that_hangs_ends_what_runs(model_folder: Callable[[str], Path]) -> None:
    before = ranks_of(os.getpid())
    async with AsyncEngine(settings(model_folder("llama"), 2, watchdog_timeout=1.0)) as engine:
        [rank] = ranks_of(os.getpid()) - before
        stream = engine.stream(Request("seen", (5, 6), FOREVER, stream=True))
        await anext(stream)
        os.kill(rank, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(RankFailed, match=r"longer than 1 seconds \(watchdog_timeout\)"):
            async for _ in stream:
                pass
        assert time.monotonic() - begun < 10.0
    assert not {rank} & ranks_of(os.getpid())


async def test_ranks_that_cannot_start_are_told_and_so_is_an_end_while_nothing_runs(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ranks_of(os.getpid())
    engine = AsyncEngine(settings(model_folder("llama"), 2))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such interpreter >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RankFailed, match="ended with status 3: no such interpreter"):
        await engine.start()
    assert ranks_of(os.getpid()) == before
    monkeypatch.undo()
    async with engine:  # it may be tried again
        answer = await engine.generate(Request("r", (1,), Sampling(max_new_tokens=2)))
    assert answer.finish.completion_tokens == 2


async def test_what_cannot_be_shared_starts_no_process(
    model_folder: Callable[[str], Path],
) -> None:
    before = ranks_of(os.getpid())
    for kind, size, words in (
        ("llama", 3, "tp_size: 3 does not divide 4 attention heads of LlamaForCausalLM"),
        ("gpt2", 2, "tp_size: GPT2LMHeadModel declares no plan"),
    ):
        with pytest.raises(ConfigError, match=words):
            await AsyncEngine(settings(model_folder(kind), size)).start()
    assert ranks_of(os.getpid()) == before


PROGRAM = """
import asyncio, os, sys
from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.request import Request, Sampling

async def main():
    engine = AsyncEngine(EngineConfig(sys.argv[1], tp_size=2, max_total_tokens=1000, device="cpu"))
    await engine.start()
    forever = Sampling(max_new_tokens=450, temperature=0.0, ignore_eos=True)
    async for delta in engine.stream(Request("r", (1, 2), forever, stream=True)):
        print("running", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_parent(
    number: signal.Signals, model_folder: Callable[[str], Path]
) -> None:
    """Ctrl-C reaches all processes of the terminal's group; `kill -9` lets nobody say goodbye."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model_folder("llama"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "running\n"
        ranks = ranks_of(parent.pid)
        assert len(ranks) == 1
        os.killpg(parent.pid, number)
        parent.communicate(timeout=20)
    assert parent.returncode != 0
    wait_for_end(ranks)
