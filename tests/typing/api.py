"""User code that type checkers must accept as it is; never run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal, assert_type

import asyncsgl as sgl
from asyncsgl import events
from asyncsgl.testing import RecordingBackend, ScriptedBackend


@sgl.function
async def tips(s: sgl.ProgramState, topic: str, tone: str = "kind") -> str:
    s += sgl.system(f"Be {tone}.")
    s += sgl.user("Tips on " + topic) + sgl.assistant(sgl.gen("tips", max_tokens=64, stop="\n"))
    with s.user():
        s += "More?"
    with s.assistant():
        s += ["Yes: ", sgl.gen("more", temperature=0.5, top_p=0.9, seed=1)]
    async with s.fork(2) as branches:
        for number, branch in enumerate(branches):
            branch += sgl.user(f"Tip {number}?") + sgl.assistant(sgl.gen("detail"))
    others = s.fork(3)
    others += [sgl.user("a"), sgl.user("b"), sgl.user("c")]
    await others.join("concate_and_append", return_exceptions=True)
    verdict: str = await s.select("verdict", ["yes", "no"])
    s.set("loud", verdict.upper())
    count: int = len(await s["tips"])
    return verdict * count


@sgl.function
def plain(s: sgl.ProgramState) -> None:
    s += "One" + sgl.gen("n", dtype=int) + sgl.gen(choices=["a", "b"])
    s += sgl.gen("color", dtype=Literal["red", "blue"], max_new_tokens=4)
    s += sgl.image("cat.png") + sgl.video(b"...", num_frames=4)
    s += sgl.separate_reasoning(sgl.gen("answer"), "qwen3")


async def runs(backend: sgl.Backend) -> None:
    state = await tips.run(topic="tea", backend=backend, temperature=0, max_new_tokens=8)
    assert_type(state, sgl.State)
    assert_type(state.usage, sgl.Usage)
    assert_type(state.usage.total_tokens, int)
    assert_type(state.text(), str)
    assert_type(state.variables, dict[str, Any])
    assert_type(await tips("tea"), sgl.State)
    assert_type(tips.bind(tone="dry"), sgl.Program)


async def batches(backend: sgl.Backend) -> None:
    states = await tips.run_batch([{"topic": "tea"}], backend=backend, num_threads=4)
    assert len(states) == 1
    outcomes = tips.iter_batch(({"topic": name} for name in "abc"), num_threads="auto")
    assert_type(outcomes, AsyncGenerator[sgl.Outcome[Mapping[str, object], sgl.State], None])
    async for outcome in outcomes:
        assert_type(outcome.error, Exception | None)
        assert_type(outcome.value, sgl.State | None)
        assert_type(outcome.result(), sgl.State)


async def streams() -> None:
    async with tips.stream(topic="tea") as run:
        assert_type(run, sgl.ProgramStream)
        async for piece in run.text("tips"):
            assert_type(piece, str)
        async for event in run:
            match event:
                case events.Text(name=name, text=text):
                    assert_type(name, str | None)
                    assert_type(text, str)
                case events.VariableFailed(error=error):
                    assert_type(error, BaseException)
                case _:
                    pass
        assert_type(await run.result(), sgl.State)


async def backends() -> None:
    async with sgl.Runtime(model_path="smollm2-135m-instruct", page_size=16) as runtime:
        assert_type(runtime, sgl.Runtime)
        runtime.endpoint.chat_template = sgl.get_chat_template("chatml")
    with sgl.use_backend(ScriptedBackend({"a": "b"}, chunk_size=2)) as scripted:
        assert_type(scripted.capabilities, sgl.Capabilities)
    recorder = RecordingBackend(ScriptedBackend(lambda request: request.request_id))
    sgl.set_default_backend(recorder)
    again = ScriptedBackend(recorder.script())
    assert_type(again.requests, list[sgl.GenRequest])


async def errors() -> None:
    try:
        await tips.run(topic="tea")
    except sgl.RateLimitError as error:
        assert_type(error.retry_after, float | None)
    except sgl.UnsupportedFeature as error:
        assert_type(error.hint, str)
    except sgl.AsyncSGLError as error:
        assert_type(error.state, object)
