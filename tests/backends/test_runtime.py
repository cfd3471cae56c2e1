"""Programs on the local engine: answers, scores, cancellation, errors, life."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.types import GenRequest, Message, SamplingParams

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer of single bytes."""
    from tests.engine.conftest import save_model  # not where LiteLLM has its environment

    return save_model("llama", tmp_path_factory.mktemp("model"))


def make(model: Path, **settings: Any) -> sgl.Runtime:
    options = {"num_threads": 1, "dtype": "float32", "max_total_tokens": 8192, **settings}
    return sgl.Runtime(str(model), **options)


@pytest.fixture
async def runtime(model: Path) -> AsyncIterator[sgl.Runtime]:
    async with make(model) as made:
        yield made
        assert held_pages(made) == 0


def held_pages(runtime: sgl.Runtime) -> float:
    return runtime.statistics()["pages_held"]


@sgl.function
async def ask(s: sgl.ProgramState, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=12))


@sgl.function
async def go_on(s: sgl.ProgramState, tokens: int = 4000) -> None:
    s += "Once upon a time"
    s += sgl.gen("story", max_tokens=tokens, ignore_eos=True)


async def until_running(runtime: sgl.Runtime) -> None:
    """Return when what was asked before is running: when something asked after it is done."""
    await ask.run(question="x", backend=runtime)
    assert runtime.statistics()["running"] > 0


async def until_free(runtime: sgl.Runtime) -> None:
    """Return when no request runs; every page is free then."""
    assert await runtime.flush_cache(wait=True)
    counts = runtime.statistics()
    assert counts["pages_free"] == counts["pages_total"]


# -- answers ----------------------------------------------------------------------------


async def test_streamed_text_is_the_text(runtime: sgl.Runtime) -> None:
    plain = await ask.run(question="hello", backend=runtime, temperature=0)
    async with ask.stream(question="hello", backend=runtime, temperature=0) as run:
        pieces = [piece async for piece in run.text("answer")]
        streamed = await run.result()
    assert "".join(pieces) == streamed["answer"] == plain["answer"]
    assert streamed.meta("answer").completion_tokens == plain.meta("answer").completion_tokens


async def test_several_answers_are_a_list_and_seeds_repeat(runtime: sgl.Runtime) -> None:
    once = await ask.run(question="hello", backend=runtime, n=3, seed=5)
    again = await ask.run(question="hello", backend=runtime, n=3, seed=5)
    assert once["answer"] == again["answer"]
    assert len(set(once["answer"])) > 1
    async with ask.stream(question="hello", backend=runtime, n=3, seed=5) as run:
        pieces = [piece async for piece in run.text("answer", index=1)]
        assert (await run.result())["answer"] == once["answer"]
    assert "".join(pieces) == once["answer"][1]


async def test_metadata_tells_of_tokens_logprobs_and_times(runtime: sgl.Runtime) -> None:
    state = await ask.run(
        question="hello",
        backend=runtime,
        temperature=0,
        return_logprob=True,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    meta = state.meta("answer")
    assert len(meta.logprobs) == meta.completion_tokens
    best = meta.logprobs[0]
    assert best.logprob <= 0
    assert best.top[0][:2] == (best.token_id, best.logprob)
    assert isinstance(best.text, str)
    assert 0 < meta.timings.first_token <= meta.timings.total
    assert meta.prompt_tokens == len("USER:hello\nASSISTANT:")


async def test_branches_share_the_prefix_that_is_computed_once(runtime: sgl.Runtime) -> None:
    @sgl.function
    async def spread(s: sgl.ProgramState) -> None:
        s += "x" * 200
        async with s.fork(8) as branches:
            for index, branch in enumerate(branches):
                branch += f" {index}:" + sgl.gen("tail", max_tokens=4)

    state = await spread.run(backend=runtime)
    cached = sorted(meta.cached_tokens for meta in state.meta("tail"))
    assert sum(count >= 192 for count in cached) >= 7


async def test_a_batch_computes_what_its_prompts_share_once(model: Path) -> None:
    @sgl.function
    async def tagged(s: sgl.ProgramState, tag: str) -> None:
        s += "shared " * 60 + tag
        s += sgl.gen("x", max_tokens=2)

    async with make(model) as runtime:
        await tagged.run_batch([{"tag": str(n)} for n in range(12)], backend=runtime)
        computed = runtime.statistics()["computed_tokens"]
    assert computed < 3 * len("shared " * 60)


# -- select -----------------------------------------------------------------------------


async def logprobs_of(runtime: sgl.Runtime, text: str, start: int) -> list[float]:
    """The logprobs of the tokens of ``text`` from ``start`` on, by the model itself."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = await asyncio.to_thread(runtime.get_tokenizer)  # it may have to be read first
    ids = tokenizer(text)["input_ids"]
    net = await asyncio.to_thread(AutoModelForCausalLM.from_pretrained, runtime.model_path)
    with torch.inference_mode():
        scores = net(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(scores[i - 1, ids[i]]) for i in range(start, len(ids))]


@pytest.mark.parametrize(
    ("prefix", "choices"),
    [
        ("The answer is", [" yes", " no"]),
        ("a", ["b", "bc", "bcd"]),
        ("ab", ["c", "  c"]),
        ("The one", [" choice"]),
        ("Pick: ", [f"item {number}" for number in range(200)]),
    ],
)
async def test_choices_are_scored_as_the_model_scores_them(
    runtime: sgl.Runtime, prefix: str, choices: list[str]
) -> None:
    @sgl.function
    async def pick(s: sgl.ProgramState) -> None:
        s += prefix
        s += sgl.select("x", choices)

    state = await pick.run(backend=runtime)
    meta = state.meta("x")
    assert meta.choices == tuple(choices)
    for choice, logprobs in list(zip(choices, meta.choice_logprobs, strict=True))[:5]:
        wanted = await logprobs_of(runtime, prefix + choice, len(prefix))
        assert logprobs == pytest.approx(wanted, abs=1e-3)
    means = [sum(row) / len(row) for row in meta.choice_logprobs]
    assert state["x"] == choices[means.index(max(means))]


async def test_choices_after_nothing_are_scored_after_the_first_token(
    runtime: sgl.Runtime,
) -> None:
    @sgl.function
    async def pick(s: sgl.ProgramState) -> None:
        s += sgl.select("x", ["b", "bc"], choices_method=sgl.unconditional_likelihood_normalized)

    state = await pick.run(backend=runtime)
    assert state["x"] in ("b", "bc")
    assert [len(row) for row in state.meta("x").choice_logprobs] == [1, 2]


# -- cancellation -------------------------------------------------------------------------


async def test_cancelling_a_run_frees_its_pages(runtime: sgl.Runtime) -> None:
    task = asyncio.create_task(go_on.run(backend=runtime))
    await until_running(runtime)
    assert held_pages(runtime) > 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_free(runtime)
    assert runtime.statistics()["aborted"] == 1


async def test_leaving_a_stream_early_frees_its_pages(runtime: sgl.Runtime) -> None:
    async with go_on.stream(backend=runtime) as run:
        async for _ in run.text("story"):
            break
    await until_free(runtime)
    assert runtime.statistics()["aborted"] == 1


async def test_a_failing_branch_stops_the_others(runtime: sgl.Runtime) -> None:
    @sgl.function
    async def one_fails(s: sgl.ProgramState) -> None:
        async with s.fork(3) as branches:
            for branch in branches:
                branch += "begin " + sgl.gen("x", max_tokens=4000, ignore_eos=True)
            branches[1] += " " * 9000 + sgl.gen("y")
            await until_running(runtime)
            raise LookupError("enough")

    with pytest.raises(LookupError):
        await one_fails.run(backend=runtime)
    await until_free(runtime)


@pytest.mark.timeout(120)
async def test_10_000_random_cancels_leave_the_books_where_they_began(model: Path) -> None:
    dice = random.Random(3)
    async with make(model, max_total_tokens=2048, debug_check=True) as runtime:
        room = asyncio.Semaphore(256)

        async def impatient() -> None:
            tokens, patience = dice.randint(1, 200), dice.random() * 0.2
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(go_on.run(backend=runtime, tokens=tokens), patience)
            room.release()

        async with asyncio.TaskGroup() as group:
            for _ in range(10_000):
                await room.acquire()
                group.create_task(impatient())
        await until_free(runtime)
        counts = runtime.statistics()
        assert counts["aborted"] > 1000
        assert counts["failed"] == 0


# -- errors and life ------------------------------------------------------------------------


async def test_a_prompt_that_is_too_long_is_refused_with_both_lengths(
    runtime: sgl.Runtime,
) -> None:
    with pytest.raises(sgl.ContextLengthError, match=r"616 tokens, at most 511"):
        await ask.run(question="x" * 600, backend=runtime)
    assert (await ask.run(question="x", backend=runtime))["answer"] is not None


async def test_a_model_that_is_not_there_says_so(tmp_path: Path) -> None:
    runtime = sgl.Runtime(str(tmp_path / "nowhere"))
    with pytest.raises(sgl.BackendError, match="nowhere"):
        await ask.run(question="x", backend=runtime)
    await runtime.aclose()


@pytest.mark.parametrize(
    "settings",
    [{"page_size": 0}, {"dtype": "int3"}, {"no_such_setting": 1}, {"mem_fraction_static": 2}],
)
async def test_bad_settings_are_refused_at_once(model: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(sgl.InvalidArgument, match=next(iter(settings))):
        sgl.Runtime(str(model), **settings)


async def test_loading_has_a_limit(model: Path) -> None:
    runtime = make(model, launch_timeout=0.0001)
    try:
        with pytest.raises(sgl.BackendTimeout, match="raise launch_timeout"):
            await ask.run(question="x", backend=runtime)
    finally:
        await runtime.aclose()


async def test_the_tokenizer_may_be_elsewhere(model: Path, tmp_path: Path) -> None:
    weights, words = await asyncio.to_thread(parted, model, tmp_path)
    async with make(model) as whole:
        expected = await ask.run(question="hello", backend=whole, temperature=0)
    async with make(weights, tokenizer_path=str(words)) as there:
        state = await ask.run(question="hello", backend=there, temperature=0)
    assert state["answer"] == expected["answer"]


def parted(model: Path, target: Path) -> tuple[Path, Path]:
    """The model's weights and its tokenizer in folders of their own."""
    weights, words = target / "weights", target / "words"
    weights.mkdir()
    words.mkdir()
    for file in model.iterdir():
        kind = words if "token" in file.name else weights
        (kind / file.name).write_bytes(file.read_bytes())
    return weights, words


async def test_images_are_refused_before_anything_runs(runtime: sgl.Runtime) -> None:
    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        s += sgl.user(sgl.image(b"\x89PNG\r\n\x1a\n") + "What is it?")
        s += sgl.assistant(sgl.gen("x"))

    with pytest.raises(sgl.UnsupportedFeature, match="image"):
        await look.run(backend=runtime)


async def test_it_loads_once_when_many_begin_at_once(model: Path) -> None:
    told: list[tuple[str, float | None]] = []
    runtime = make(model, progress=lambda stage, share: told.append((stage, share)))
    states = await asyncio.gather(*(ask.run(question="x", backend=runtime) for _ in range(5)))
    assert len(states) == 5
    assert len([share for stage, share in told if stage == "Loading the model" and share == 1]) == 1
    await runtime.aclose()
    await runtime.aclose()
    runtime.shutdown()
    with pytest.raises(sgl.ClosedError):
        await ask.run(question="x", backend=runtime)


def test_it_serves_several_event_loops_one_after_another_and_at_once(model: Path) -> None:
    runtime = make(model)
    answers: list[str] = []

    def in_a_loop() -> None:
        state = asyncio.run(ask.run(question="x", backend=runtime, temperature=0))
        answers.append(state["answer"])

    in_a_loop()
    in_a_loop()
    threads = [threading.Thread(target=in_a_loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runtime.shutdown()
    assert len(answers) == 6
    assert len(set(answers)) == 1


async def test_a_prompt_can_be_computed_ahead(runtime: sgl.Runtime) -> None:
    text = "z" * 160
    await runtime.cache_prefix(
        GenRequest((Message(None, (text,)),), SamplingParams(), "ahead", text)
    )

    @sgl.function
    async def after(s: sgl.ProgramState) -> None:
        s += text + "!" + sgl.gen("x", max_tokens=1)

    state = await after.run(backend=runtime)
    assert state.meta("x").cached_tokens >= 144
    assert await after.cache(backend=runtime) == text + "!"
