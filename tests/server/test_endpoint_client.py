"""RuntimeEndpoint against this project's own server: the same programs, the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import asyncsgl as sgl

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Pair:
    """One model, reached in the process and by HTTP."""

    here: sgl.Runtime
    there: sgl.RuntimeEndpoint


@pytest.fixture
async def pair(tiny_model: Path) -> AsyncIterator[Pair]:
    """A runtime that serves, and its client."""
    runtime = sgl.Runtime(
        str(tiny_model), serve=True, num_threads=1, dtype="float32", max_total_tokens=8192
    )
    async with runtime:
        assert runtime.url is not None
        async with sgl.RuntimeEndpoint(runtime.url) as endpoint:
            yield Pair(runtime, endpoint)


@sgl.function
async def everything(s: sgl.ProgramState) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("Name a fruit.")
    s += sgl.assistant("It is " + sgl.gen("fruit", max_tokens=12, temperature=0))
    s += sgl.user("And now?")
    s += sgl.assistant(sgl.gen("digits", regex="[0-9]{4}", temperature=0))
    s += sgl.user("Good?")
    s += sgl.assistant(sgl.select("good", ["yes", "no", "maybe so"]))


@sgl.function
async def shown(s: sgl.ProgramState) -> None:
    s += "Once upon a time"
    s += sgl.gen(
        "story",
        max_tokens=8,
        temperature=0,
        return_logprob=True,
        logprob_start_len=1,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )


async def test_a_program_gives_the_same(pair: Pair) -> None:
    here = await everything.run(backend=pair.here)
    there = await everything.run(backend=pair.there)
    assert there.text() == here.text()
    assert there["digits"] == here["digits"]
    mine, theirs = here.meta("good"), there.meta("good")
    assert isinstance(mine, sgl.Meta)
    assert isinstance(theirs, sgl.Meta)
    assert theirs.choice_scores == pytest.approx(mine.choice_scores, abs=1e-4)


async def test_streams_give_the_same(pair: Pair) -> None:
    texts = []
    for backend in (pair.here, pair.there):
        async with shown.stream(backend=backend) as run:
            texts.append("".join([piece async for piece in run.text("story")]))
    assert texts[0] == texts[1] != ""


async def test_logprobs_give_the_same(pair: Pair) -> None:
    metas = [(await shown.run(backend=each)).meta("story") for each in (pair.here, pair.there)]
    for meta in metas:
        assert isinstance(meta, sgl.Meta)
        assert meta.logprobs is not None
        assert meta.prompt_logprobs is not None
    here, there = [meta for meta in metas if isinstance(meta, sgl.Meta)]
    assert [e.token_id for e in there.logprobs or ()] == [e.token_id for e in here.logprobs or ()]
    assert [e.text for e in there.logprobs or ()] == [e.text for e in here.logprobs or ()]
    assert [e.logprob for e in there.logprobs or ()] == pytest.approx(
        [e.logprob for e in here.logprobs or ()], abs=1e-4
    )
    assert [len(e.top) for e in there.logprobs or ()] == [2] * 8
    assert [e.token_id for e in there.prompt_logprobs or ()] == [
        e.token_id for e in here.prompt_logprobs or ()
    ]


@pytest.mark.parametrize(
    "method",
    [
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    ],
)
@pytest.mark.parametrize("prompt", ["", "A", "The answer is", "The answer is "])
async def test_choices_are_scored_the_same(
    pair: Pair, method: sgl.ChoicesMethod, prompt: str
) -> None:
    @sgl.function
    async def choose(s: sgl.ProgramState) -> None:
        if prompt:
            s += prompt
        s += sgl.select("it", ["yes", " no", "perhaps not"], choices_method=method)

    metas = [(await choose.run(backend=each)).meta("it") for each in (pair.here, pair.there)]
    here, there = [meta for meta in metas if isinstance(meta, sgl.Meta)]
    assert there.choice_logprobs is not None
    assert here.choice_logprobs is not None
    for mine, theirs in zip(here.choice_logprobs, there.choice_logprobs, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)
    assert there.choice_scores == pytest.approx(here.choice_scores, abs=1e-4)


async def test_several_seeded_answers_give_the_same(pair: Pair) -> None:
    @sgl.function
    async def vary(s: sgl.ProgramState) -> None:
        s += "Once" + sgl.gen("it", n=3, seed=5, max_tokens=6)

    here, there = [await vary.run(backend=each) for each in (pair.here, pair.there)]
    assert there["it"] == here["it"]
    assert len(set(there["it"])) == 3


async def test_cancelling_frees_the_pages(pair: Pair) -> None:
    @sgl.function
    async def long(s: sgl.ProgramState) -> None:
        s += "Once" + sgl.gen("it", max_tokens=1500, ignore_eos=True)

    for streaming in (False, True):
        begun = asyncio.Event()

        async def run(streaming: bool = streaming, begun: asyncio.Event = begun) -> None:
            if streaming:
                async with long.stream(backend=pair.there) as stream:
                    async for _ in stream.text("it"):
                        begun.set()
            await long.run(backend=pair.there)

        task = asyncio.ensure_future(run())
        if streaming:
            await begun.wait()
        else:
            while not pair.here.statistics()["running"]:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pair.here.flush_cache(wait=True)
        statistics = pair.here.statistics()
        assert statistics["pages_free"] == statistics["pages_total"]


async def test_utilities(pair: Pair) -> None:
    await sgl.cache_prefix("A beginning that is long enough for a page or two. " * 4, pair.there)
    assert pair.here.statistics()["pages_cached"] > 0
    assert await sgl.flush_cache(pair.there)
    assert pair.here.statistics()["pages_cached"] == 0
    info = await sgl.get_server_info(pair.there)
    assert info["status"] == "ready"
    assert (await sgl.get_server_info(pair.here))["model_path"] == pair.here.model_path


async def test_refusals(pair: Pair) -> None:
    @sgl.function
    async def too_long(s: sgl.ProgramState) -> None:
        s += "word " * 3000 + sgl.gen("it")

    with pytest.raises(sgl.ContextLengthError):
        await too_long.run(backend=pair.there)

    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        s += sgl.user(sgl.image(b"\x89PNG\r\n\x1a\n")) + sgl.assistant(sgl.gen("it"))

    pair.there.chat_template = sgl.get_chat_template("chatml-llava")
    with pytest.raises(sgl.UnsupportedFeature, match="takes only text"):
        await look.run(backend=pair.there)
