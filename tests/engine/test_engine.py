"""The engine as its users meet it: answers, streams, cancellation, errors, life and death."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.errors import (
    Closed,
    EngineError,
    InvalidRequest,
    ModelError,
    Overloaded,
    PromptTooLong,
)
from asyncsgl_engine.request import Completion, Delta, Grammar, Request, Sampling

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

GREEDY = Sampling(max_new_tokens=16, temperature=0.0, ignore_eos=True)


def config_for(folder: Path, **settings: Any) -> EngineConfig:
    sizes: dict[str, Any] = {"max_total_tokens": 2000, "page_size": 4, "debug_check": True}
    return EngineConfig(model_path=str(folder), dtype="float32", **(sizes | settings))


@pytest.fixture
async def engine(model_folder: Callable[[str], Path]) -> AsyncIterator[AsyncEngine]:
    """A running engine; its pages must be back at the end."""
    async with AsyncEngine(config_for(model_folder("llama"))) as running:
        yield running
        await running.check()
        assert running.statistics().pages_held == 0
        assert running.statistics().running == 0


async def collect(engine: AsyncEngine, request: Request) -> tuple[Completion, list[Delta]]:
    """The streamed answer, as a whole and in pieces."""
    deltas = [delta async for delta in engine.stream(replace(request, stream=True))]
    finish = deltas[-1].finish
    assert finish is not None
    assert all(delta.finish is None for delta in deltas[:-1])
    whole = Completion(
        request.request_id,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        finish,
    )
    return whole, deltas


async def test_a_stream_adds_up_to_the_answer(engine: AsyncEngine) -> None:
    request = Request("r", tuple(b"hello"), Sampling(max_new_tokens=40, seed=3))
    answer = await engine.generate(request)
    streamed, deltas = await collect(engine, request)
    assert len(deltas) > 10
    assert {delta.cached_tokens for delta in deltas} == {streamed.finish.cached_tokens}
    assert streamed.finish.cached_tokens > 0
    assert (streamed.text, streamed.token_ids) == (answer.text, answer.token_ids)
    assert answer.text == engine.tokenizer.decode(answer.token_ids)
    assert answer.finish.completion_tokens == 40
    assert answer.finish.prompt_tokens == 5
    assert 0 <= answer.finish.queue_s <= answer.finish.ttft_s <= answer.finish.total_s


async def test_penalties_outlast_an_answer_of_many_tokens(engine: AsyncEngine) -> None:
    sampling = replace(GREEDY, max_new_tokens=400, presence_penalty=0.5)
    answers = [await engine.generate(Request(name, (5, 6, 7), sampling)) for name in "ab"]
    assert [len(answer.token_ids) for answer in answers] == [400, 400]
    assert answers[0].token_ids == answers[1].token_ids


async def test_the_least_repetition_penalty_leaves_numbers(engine: AsyncEngine) -> None:
    sampling = replace(GREEDY, repetition_penalty=5e-324)
    answer = await engine.generate(Request("r", (5, 6, 7), sampling))
    assert len(answer.token_ids) == 16


async def test_it_stops_at_strings_tokens_patterns_and_the_end_of_sequence(
    engine: AsyncEngine,
) -> None:
    free = await engine.generate(Request("free", tuple(b"abc"), GREEDY))
    stop_token = free.token_ids[6]
    first = free.token_ids.index(stop_token)
    by_token = await engine.generate(
        Request("t", tuple(b"abc"), replace(GREEDY, stop_token_ids=(stop_token,)))
    )
    assert by_token.token_ids == free.token_ids[: first + 1]
    assert (by_token.finish.reason, by_token.finish.matched) == ("stop", stop_token)
    assert by_token.text == engine.tokenizer.decode(free.token_ids[:first])
    stop = free.text[4:7]
    for sampling in (
        replace(GREEDY, stop=(stop,)),
        replace(GREEDY, stop_regex=("(?s)" + "." * 5,)),
    ):
        answer = await engine.generate(Request("s", tuple(b"abc"), sampling))
        assert answer.finish.reason == "stop"
        assert answer.finish.matched in (*sampling.stop, *sampling.stop_regex)
        assert free.text.startswith(answer.text)
        assert stop not in answer.text
        streamed, _ = await collect(engine, Request("s", tuple(b"abc"), sampling))
        assert streamed.text == answer.text
    late = replace(GREEDY, stop_token_ids=(stop_token,), min_new_tokens=12)
    answer = await engine.generate(Request("late", tuple(b"abc"), late))
    assert len(answer.token_ids) >= 12


async def test_eos_ends_unless_it_is_ignored(engine: AsyncEngine) -> None:
    eos = 257
    pushed = replace(GREEDY, ignore_eos=False, logit_bias=((eos, 100.0),))
    answer = await engine.generate(Request("r", (1, 2), pushed))
    assert (answer.token_ids, answer.text) == ((eos,), "")
    assert (answer.finish.reason, answer.finish.matched) == ("stop", eos)
    answer = await engine.generate(Request("r", (1, 2), replace(pushed, ignore_eos=True)))
    assert answer.token_ids == (eos,) * 16
    assert (answer.finish.reason, answer.text) == ("length", "")


async def test_seeds_repeat_among_different_batch_mates(engine: AsyncEngine) -> None:
    warm = Sampling(max_new_tokens=20, temperature=1.3, top_p=0.9, seed=42, ignore_eos=True)
    request = Request("r", tuple(b"once upon"), warm)
    alone = await engine.generate(request)
    mates = [Request(f"mate{n}", tuple(b"once" * (n + 1)), replace(warm, seed=n)) for n in range(5)]
    together = await asyncio.gather(*map(engine.generate, [*mates, request]))
    assert together[-1].token_ids == alone.token_ids
    assert len({answer.token_ids for answer in together}) == 6


async def test_logprobs_are_the_models_own(
    engine: AsyncEngine, model_folder: Callable[[str], Path]
) -> None:
    prompt = tuple(b"some words to score")
    sampling = replace(GREEDY, max_new_tokens=5, presence_penalty=1.0)
    request = Request(
        "r",
        prompt,
        sampling,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
        token_ids_logprob=(5, 6),
    )
    plain = await engine.generate(Request("plain", prompt, sampling))
    # The second time the prompt is cached, and must be scored all the same.
    for answer in [await engine.generate(request), (await collect(engine, request))[0]]:
        assert answer.token_ids == plain.token_ids
        whole = [*prompt, *answer.token_ids]
        model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
        with torch.inference_mode():
            expected = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        entries = [*answer.prompt_logprobs, *answer.logprobs]
        assert [entry.token_id for entry in entries] == whole
        assert entries[0].logprob is None
        for position, entry in enumerate(entries[1:]):
            row = expected[position]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
            assert [token for token, _ in entry.chosen] == [5, 6]
            assert entry.chosen[0][1] == pytest.approx(float(row[5]), abs=1e-3)


async def test_scoring_computes_the_prefix_once(engine: AsyncEngine) -> None:
    prefix = tuple(b"the answer to this long question is")
    before = engine.statistics().computed_tokens
    scores = await engine.score(prefix, [tuple(b" yes"), tuple(b" no"), tuple(b" perhaps")])
    assert [len(entries) for entries in scores] == [4, 3, 8]
    computed = engine.statistics().computed_tokens - before
    assert computed < len(prefix) + 3 * 4 + 4 + 3 + 8
    assert (await engine.score((65,), [(66,)]))[0][0].token_id == 66


async def test_scoring_only_and_one_token_prompts(engine: AsyncEngine) -> None:
    nothing = Sampling(max_new_tokens=0)
    request = Request("r", (65,), nothing, return_logprob=True, logprob_start_len=0)
    answer = await engine.generate(request)
    assert [entry.logprob for entry in answer.prompt_logprobs] == [None]
    assert (answer.token_ids, answer.text, answer.finish.reason) == ((), "", "length")
    await engine.generate(Request("warm", tuple(b"12345678"), nothing))
    warm = await engine.generate(Request("again", tuple(b"12345678x"), GREEDY))
    assert warm.finish.cached_tokens == 8


async def test_grammars_are_followed(engine: AsyncEngine) -> None:
    hot = Sampling(max_new_tokens=60, temperature=1.5, seed=1)
    number = Request("n", tuple(b"x"), hot, grammar=Grammar("regex", r"-?[1-9]\d{2,4}(km|mile)"))
    import re

    answers = await asyncio.gather(
        engine.generate(number),
        engine.generate(replace(number, request_id="m", stream=True)),
        engine.generate(Request("free", tuple(b"y"), hot)),
    )
    for answer in answers[:2]:
        assert re.fullmatch(r"-?[1-9]\d{2,4}(km|mile)", answer.text)
        assert answer.finish.reason == "stop"
    short = replace(number, sampling=replace(hot, max_new_tokens=2))
    assert (await engine.generate(short)).finish.reason == "length"
    with pytest.raises(InvalidRequest, match="grammar"):
        await engine.generate(replace(number, grammar=Grammar("regex", "(")))


async def test_a_bad_request_hurts_no_other(engine: AsyncEngine) -> None:
    good = asyncio.create_task(engine.generate(Request("good", tuple(b"abc"), GREEDY)))
    with pytest.raises(PromptTooLong, match="the prompt has 600 tokens, at most 511 fit"):
        await engine.generate(Request("long", (1,) * 600, GREEDY))
    with pytest.raises(InvalidRequest, match=r"token id 300 is not in \[0, 299\]"):
        await engine.generate(Request("vocab", (300,), GREEDY))
    with pytest.raises(InvalidRequest, match="does not compile"):
        await engine.generate(Request("regex", (3,), replace(GREEDY, stop_regex=("(",))))
    assert (await good).finish.reason == "length"
    assert engine.statistics().failed == 3


async def test_the_length_of_a_sequence_ends_at_the_context(engine: AsyncEngine) -> None:
    answer = await engine.generate(Request("r", (1,) * 500, replace(GREEDY, max_new_tokens=400)))
    assert (len(answer.token_ids), answer.finish.reason) == (12, "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_frees_the_pages_within_a_step(engine: AsyncEngine, stream: bool) -> None:
    endless = replace(GREEDY, max_new_tokens=450)
    request = Request("r", tuple(b"abc"), endless, stream=stream)

    async def run() -> None:
        if stream:
            async for _ in engine.stream(request):
                pass
        else:
            await engine.generate(request)

    task = asyncio.create_task(run())
    witness = engine.stream(Request("w", tuple(b"xyz"), endless, stream=True))
    async for _ in witness:
        if engine.statistics().running == 2:
            break
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    steps = engine.statistics().steps
    async for _ in witness:
        if engine.statistics().running == 1:
            break
    assert engine.statistics().steps <= steps + 3
    await witness.aclose()
    await engine.check()
    assert engine.statistics().aborted >= 1


async def test_the_same_id_may_be_used_again_at_once(engine: AsyncEngine) -> None:
    for _ in range(20):
        task = asyncio.create_task(engine.generate(Request("same", tuple(b"abc"), GREEDY)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    answer = await engine.generate(Request("same", tuple(b"abc"), GREEDY))
    assert answer.finish.reason == "length"
    first = asyncio.create_task(engine.generate(Request("twice", tuple(b"abc"), GREEDY)))
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequest, match="in use"):
        await engine.generate(Request("twice", tuple(b"abc"), GREEDY))
    await first


async def test_an_abort_by_id_gives_what_there_is(engine: AsyncEngine) -> None:
    request = Request("r", tuple(b"abc"), replace(GREEDY, max_new_tokens=450), stream=True)
    deltas = []
    async for delta in engine.stream(request):
        deltas.append(delta)
        engine.abort("r")
    finish = deltas[-1].finish
    assert finish is not None
    assert finish.reason == "abort"
    assert 0 < finish.completion_tokens < 450


async def test_random_cancels_leave_the_books_in_order(engine: AsyncEngine) -> None:
    async def one(number: int) -> None:
        request = Request(f"c{number}", (*tuple(b"common prefix"), number % 200), GREEDY)
        async with asyncio.timeout((number * 7919 % 97) / 2000):
            await engine.generate(request)

    results = await asyncio.gather(*map(one, range(300)), return_exceptions=True)
    assert {type(result) for result in results} <= {TimeoutError, type(None)}
    assert any(isinstance(result, TimeoutError) for result in results)


async def test_a_full_queue_refuses(model_folder: Callable[[str], Path]) -> None:
    config = config_for(model_folder("llama"), max_queued_requests=3, max_running_requests=1)
    async with AsyncEngine(config) as engine:
        tasks = [
            asyncio.create_task(engine.generate(Request(f"r{n}", tuple(b"abc"), GREEDY)))
            for n in range(12)
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert refused
    assert refused[0].limit == 3
    assert len(refused) + sum(isinstance(result, Completion) for result in results) == 12


async def test_flushing_waits_or_refuses_while_requests_run(engine: AsyncEngine) -> None:
    request = Request("r", tuple(b"a longer prompt"), replace(GREEDY, max_new_tokens=200))
    task = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0)
    assert not await engine.flush_cache()
    assert await engine.flush_cache(wait=True)
    assert engine.statistics().pages_free == engine.statistics().pages_total
    assert (await task).finish.reason == "length"


async def test_who_comes_after_a_flush_waits_behind_it_and_it_waits_for_nobody_else(
    engine: AsyncEngine,
) -> None:
    prompt = tuple(b"all of them begin with this")
    long = replace(GREEDY, max_new_tokens=450)
    stream = engine.stream(Request("first", prompt, long, stream=True))
    made = len((await anext(stream)).token_ids)
    flush = asyncio.create_task(engine.flush_cache(wait=True))
    await asyncio.sleep(0)
    later = [
        asyncio.create_task(engine.generate(Request(f"later{number}", prompt, GREEDY)))
        for number in range(4)
    ]
    await asyncio.sleep(0)
    engine.abort("later2")
    later[3].cancel()
    assert await flush
    made += sum([len(delta.token_ids) async for delta in stream])
    assert made == 450
    one, two, aborted, cancelled = await asyncio.gather(*later, return_exceptions=True)
    assert isinstance(one, Completion)
    assert isinstance(two, Completion)
    assert one.finish.cached_tokens == 0  # what the first one left was flushed by then
    assert one.token_ids == two.token_ids
    assert isinstance(aborted, Completion)
    assert isinstance(cancelled, asyncio.CancelledError)


async def test_a_flush_that_is_given_up_holds_nobody_back(engine: AsyncEngine) -> None:
    long = replace(GREEDY, max_new_tokens=400)
    first = asyncio.create_task(engine.generate(Request("first", tuple(b"first"), long)))
    await asyncio.sleep(0)
    flush = asyncio.create_task(engine.flush_cache(wait=True))
    await asyncio.sleep(0)
    later = asyncio.create_task(engine.generate(Request("later", tuple(b"later"), GREEDY)))
    await asyncio.sleep(0)
    flush.cancel()
    await later
    assert not first.done()
    await first


async def test_several_event_loops_at_once(engine: AsyncEngine) -> None:
    texts: list[str] = []

    def other() -> None:
        async def run() -> str:
            stream = engine.stream(
                Request(threading.current_thread().name, tuple(b"abc"), GREEDY, stream=True)
            )
            return "".join([delta.text async for delta in stream])

        texts.append(asyncio.run(run()))

    mine = await engine.generate(Request("mine", tuple(b"abc"), GREEDY))
    await asyncio.gather(*(asyncio.to_thread(other) for _ in range(4)))
    assert texts == [mine.text] * 4


async def test_a_start_that_fails_says_why_and_may_be_repeated(tmp_path: Path) -> None:
    engine = AsyncEngine(config_for(tmp_path))
    for _ in range(2):
        with pytest.raises(ModelError):
            await engine.start()
    with pytest.raises(EngineError, match="not started"):
        engine.statistics()
    await engine.aclose()


async def test_shutting_down_ends_what_runs(model_folder: Callable[[str], Path]) -> None:
    engine = AsyncEngine(config_for(model_folder("llama")))
    await asyncio.gather(engine.start(), engine.start())
    endless = replace(GREEDY, max_new_tokens=480)
    task = asyncio.create_task(engine.generate(Request("r", (1, 2), endless)))
    await asyncio.sleep(0)
    await engine.aclose()
    with pytest.raises(Closed, match="while this request was in it"):
        await task
    with pytest.raises(Closed, match="shut down"):
        await engine.start()
    await engine.aclose()
    assert [thread for thread in threading.enumerate() if "engine" in thread.name] == []


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "ahead"])
async def test_a_profile_holds_the_forward_pass(
    model_folder: Callable[[str], Path], tmp_path: Path, apart: bool
) -> None:
    """Whether the pass has a thread of its own or not."""
    config = config_for(model_folder("llama"), device="cpu", disable_overlap_schedule=apart)
    async with AsyncEngine(config) as engine:
        assert engine.config.overlap is not apart
        await engine.generate(Request("before", (5, 6), GREEDY))
        await engine.start_profile()
        await engine.generate(Request("within", (7, 8), GREEDY))
        path = tmp_path / "trace.json"
        await engine.stop_profile(path)
    events = json.loads(await asyncio.to_thread(path.read_text))["traceEvents"]
    passes = [event for event in events if event["name"] == "asyncsgl::forward"]
    assert len(passes) >= GREEDY.max_new_tokens
    (thread,) = {event["tid"] for event in passes}
    within = [event for event in events if event.get("tid") == thread]
    assert len([event for event in within if event["name"].startswith("aten::")]) > len(passes)
