"""Images in programs on the local engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import asyncsgl as sgl
from asyncsgl.lang.template import JinjaTemplate
from asyncsgl.types import Message
from tests.engine.conftest import save_model
from tests.engine.tiny_vision import CHAT_TEMPLATE, VisionOracle, picture, save_vision_model

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

RED, BLUE = picture(1), picture(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def oracle(model: Path) -> VisionOracle:
    return VisionOracle(model)


def make(model: Path, **settings: Any) -> sgl.Runtime:
    options = {"num_threads": 1, "dtype": "float32", "max_total_tokens": 8192, **settings}
    return sgl.Runtime(str(model), **options)


@pytest.fixture
async def runtime(model: Path) -> Any:
    async with make(model, debug_check=True) as made:
        yield made


def answer(oracle: VisionOracle, text: str, *images: bytes, count: int = 8) -> str:
    tokens = oracle(text, images, count)
    end = tokens.index(257) if 257 in tokens else len(tokens)
    return str(oracle.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True))


@sgl.function
async def look(s: sgl.ProgramState, image: Any, question: str) -> None:
    s += sgl.user(sgl.image(image) + question)
    s += sgl.assistant(sgl.gen("it", max_tokens=8, temperature=0))


async def test_an_image_of_a_turn_stands_where_the_models_template_puts_it(
    runtime: sgl.Runtime, oracle: VisionOracle, tmp_path: Path
) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    states = [
        await look.run(image=image, question="What?", backend=runtime) for image in (path, BLUE)
    ]
    text = "USER: <image>\nWhat? ASSISTANT: "
    assert [state["it"] for state in states] == [
        await asyncio.to_thread(answer, oracle, text, image) for image in (RED, BLUE)
    ]
    assert states[0]["it"] != states[1]["it"]
    assert states[0].meta("it").prompt_tokens == len(oracle.ids(text, [RED]))


async def test_a_turn_of_text_is_shown_by_a_template_of_parts(
    runtime: sgl.Runtime, oracle: VisionOracle
) -> None:
    @sgl.function
    async def talk(s: sgl.ProgramState) -> None:
        s += sgl.user("Hello" + " there")
        s += sgl.assistant("Well, " + sgl.gen("it", max_tokens=8, temperature=0))

    state = await talk.run(backend=runtime)
    text = "USER: Hello there ASSISTANT: Well, "
    assert state["it"] == await asyncio.to_thread(answer, oracle, text)


async def test_an_image_in_a_later_turn_and_one_outside_of_turns(
    runtime: sgl.Runtime, oracle: VisionOracle
) -> None:
    @sgl.function
    async def twice(s: sgl.ProgramState) -> None:
        s += sgl.user(sgl.image(RED) + "One?")
        s += sgl.assistant("A square.")
        s += sgl.user("And " + sgl.image(BLUE))
        s += sgl.assistant(sgl.gen("it", max_tokens=8, temperature=0))

    @sgl.function
    async def raw(s: sgl.ProgramState) -> None:
        s += "Look: " + sgl.image(RED) + " It is" + sgl.gen("it", max_tokens=8, temperature=0)

    state = await twice.run(backend=runtime)
    text = "USER: <image>\nOne? ASSISTANT: A square. USER: <image>\nAnd  ASSISTANT: "
    assert state["it"] == await asyncio.to_thread(answer, oracle, text, RED, BLUE)
    state = await raw.run(backend=runtime)
    assert state["it"] == await asyncio.to_thread(answer, oracle, "Look: <image> It is", RED)


async def test_forks_samples_and_streams_share_the_image(
    runtime: sgl.Runtime, oracle: VisionOracle
) -> None:
    @sgl.function
    async def spread(s: sgl.ProgramState) -> None:
        s += "Look: " + sgl.image(RED)
        async with s.fork(3) as branches:
            for index, branch in enumerate(branches):
                branch += f" {index}:" + sgl.gen("tail", max_tokens=6, temperature=0)

    state = await spread.run(backend=runtime)
    expected = [
        await asyncio.to_thread(partial(answer, count=6), oracle, f"Look: <image> {index}:", RED)
        for index in range(3)
    ]
    assert state["tail"] == expected
    assert sorted(meta.cached_tokens for meta in state.meta("tail"))[1] >= 16

    @sgl.function
    async def twice(s: sgl.ProgramState) -> None:
        s += "Look: " + sgl.image(BLUE) + sgl.gen("it", n=2, max_tokens=6, temperature=0)

    async with twice.stream(backend=runtime) as run:
        pieces = [event async for event in run]
        state = await run.result()
    one = await asyncio.to_thread(partial(answer, count=6), oracle, "Look: <image>", BLUE)
    assert state["it"] == [one, one]
    assert pieces


async def test_choices_are_scored_after_an_image(
    runtime: sgl.Runtime, oracle: VisionOracle
) -> None:
    @sgl.function
    async def pick(s: sgl.ProgramState) -> None:
        s += "Look: " + sgl.image(RED) + " It is "
        s += sgl.select("it", ["red", "blue", "green"])

    state = await pick.run(backend=runtime)
    inputs = [
        oracle.inputs(f"Look: <image> It is {word}", [RED]) for word in ("red", "blue", "green")
    ]

    def mean(given: Any, count: int) -> float:
        import torch

        with torch.inference_mode():
            logprobs = oracle.model(**given).logits[0].log_softmax(-1)
        ids = given["input_ids"][0]
        return (
            sum(float(logprobs[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids)))
            / count
        )

    scores = [
        await asyncio.to_thread(mean, given, len(word))
        for given, word in zip(inputs, ("red", "blue", "green"), strict=True)
    ]
    assert state["it"] == ("red", "blue", "green")[scores.index(max(scores))]


async def test_a_prefix_with_an_image_is_computed_ahead(runtime: sgl.Runtime) -> None:
    @sgl.function
    async def ask(s: sgl.ProgramState, end: str) -> None:
        s += "Look: " + sgl.image(BLUE) + "and say " + end
        s += sgl.gen("it", max_tokens=2)

    states = await ask.run_batch([{"end": "a"}, {"end": "b"}], backend=runtime)
    assert max(state.meta("it").cached_tokens for state in states) >= 16


async def test_a_text_model_refuses_an_image_before_it_computes(tmp_path: Path) -> None:
    async with make(save_model("llama", tmp_path)) as runtime:
        runtime.chat_template = sgl.get_chat_template("chatml-llava")
        assert runtime.capabilities.support("image") == "refused"
        with pytest.raises(sgl.UnsupportedFeature, match=r"image: the model .* reads text only"):
            await look.run(image=RED, question="What?", backend=runtime)
        assert runtime.statistics()["steps"] == 0


async def test_a_text_model_that_is_not_loaded_yet_refuses_it_too(tmp_path: Path) -> None:
    runtime = make(save_model("llama", tmp_path))
    runtime.chat_template = sgl.get_chat_template("chatml-llava")
    try:
        with pytest.raises(sgl.UnsupportedFeature, match=r"image: the model .* reads text only"):
            await look.run(image=RED, question="What?", backend=runtime)
    finally:
        await runtime.aclose()


async def test_what_the_engine_refuses_of_an_image_is_told(runtime: sgl.Runtime) -> None:
    with pytest.raises(sgl.BadRequestError, match="not a whole PNG"):
        await look.run(image=RED[:50], question="What?", backend=runtime)


@pytest.fixture
def site() -> Iterator[tuple[int, list[str]]]:
    """A web server with one image: its port, and who asked."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(RED)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], asked
        server.shutdown()
        thread.join()


async def test_urls_are_fetched_from_allowed_hosts_outside_this_network_only(
    model: Path, site: tuple[int, list[str]]
) -> None:
    port, asked = site
    url = f"http://localhost:{port}/red.png"
    for settings, problem in (
        (None, r"fetches nothing from localhost.*allow_media_domains"),
        ({"allow_media_domains": ["localhost"]}, "localhost is not on the open internet"),
    ):
        async with make(model, server_settings=settings) as runtime:
            with pytest.raises(sgl.BadRequestError, match=problem):
                await look.run(image=url, question="What?", backend=runtime)
    assert asked == []


def test_server_settings_are_checked_where_nothing_is_served(model: Path) -> None:
    with pytest.raises(sgl.InvalidArgument, match="max_media_bytes"):
        make(model, server_settings={"max_media_bytes": 0})
    with pytest.raises(sgl.InvalidArgument, match="no such setting"):
        make(model, server_settings={"allow_images": True})


def test_a_template_of_parts_is_known_by_what_it_shows() -> None:
    turn = (Message("user", ("Hello ", "there")),)
    assert JinjaTemplate(CHAT_TEMPLATE).render(turn) == "USER: Hello there "
    plain = "{% for message in messages %}{{ message.content + '.' }}{% endfor %}"
    assert JinjaTemplate(plain).render(turn) == "Hello there."
