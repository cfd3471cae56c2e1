"""Images in prompts: greedy tokens equal transformers' `generate`, whatever happens around them."""

from __future__ import annotations

import asyncio
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig
from transformers.image_utils import load_image
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.errors import (
    Closed,
    ImagesOverloaded,
    InvalidRequest,
    ModelError,
    Overloaded,
    PromptTooLong,
)
from asyncsgl_engine.image_files import decode_image
from asyncsgl_engine.model import load_model
from asyncsgl_engine.request import Completion, Request, Sampling
from tests.engine.tiny_vision import KINDS, VisionOracle, picture, save_vision_model

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

Ask = tuple[str, tuple[bytes, ...]]

RED, BLUE, TALL = picture(1), picture(2), picture(3, 30, 90)
MANY: tuple[Ask, ...] = (
    ("Look: <image>What is it? ", (RED,)),
    ("Look: <image>What is it? ", (BLUE,)),
    ("Look: <image>and <image>. Which? ", (RED, TALL)),
    ("Look: <image>What is it? A square. And <image>this? ", (RED, BLUE)),
    ("<image><image>", (BLUE, BLUE)),
    ("No image at all: what is a square? ", ()),
    ("Look: no image. ", ()),
)
GREEDY = Sampling(max_new_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random model that reads images."""
    return cache(lambda kind: save_vision_model(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="session")
def oracle(vision_folder: Callable[[str], Path]) -> Callable[[str], VisionOracle]:
    """Transformers' own model of a kind."""
    return cache(lambda kind: VisionOracle(vision_folder(kind)))


def engine_of(folder: Path, **config: object) -> AsyncEngine:
    settings = {"dtype": "float32", "max_total_tokens": 8000, "debug_check": True, **config}
    return AsyncEngine(EngineConfig(model_path=str(folder), num_threads=1, **settings))  # type: ignore[arg-type]


async def ask(
    engine: AsyncEngine, name: str, given: Ask, sampling: Sampling = GREEDY, **options: object
) -> Completion:
    text, images = given
    if not images:
        ids = engine.tokenizer.encode(text)
        return await engine.generate(Request(name, tuple(ids), sampling))
    prompt = await engine.prompt(text, images)
    request = Request(name, prompt.ids, sampling, images=prompt.images, **options)  # type: ignore[arg-type]
    return await engine.generate(request)


async def give_up(engine: AsyncEngine, name: str, given: Ask, after: int) -> None:
    prompt = await engine.prompt(*given)
    endless = Sampling(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    stream = engine.stream(Request(name, prompt.ids, endless, stream=True, images=prompt.images))
    async for delta in stream:
        after -= len(delta.token_ids)
        if after <= 0:
            break
    await stream.aclose()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("page_size", "chunk", "tokens", "native", "shares"),
    [
        (1, 512, 4000, True, True),
        (16, 7, 4000, True, True),
        (16, 1, 4000, False, True),
        (4, 33, 4000, True, True),
        (64, 100, 4000, False, True),
        (16, 33, 4000, True, False),
    ],
)
async def test_greedy_tokens_equal_generate(
    kind: str,
    page_size: int,
    chunk: int,
    tokens: int,
    native: bool,
    shares: bool,
    vision_folder: Callable[[str], Path],
    oracle: Callable[[str], VisionOracle],
) -> None:
    draw = random.Random(f"{kind}{page_size}{chunk}")
    asks = [*MANY, *draw.choices(MANY, k=5)]
    draw.shuffle(asks)
    engine = engine_of(
        vision_folder(kind),
        page_size=page_size,
        chunked_prefill_size=chunk,
        max_total_tokens=tokens,
        enable_native=native,
        disable_radix_cache=not shares,
    )
    async with engine, asyncio.TaskGroup() as group:
        answers = [
            group.create_task(ask(engine, f"r{number}", given)) for number, given in enumerate(asks)
        ]
        for number in range(3):
            group.create_task(give_up(engine, f"leaver{number}", MANY[number], 2 + number))
        await asyncio.wait(answers)
        await engine.check()
        statistics = engine.statistics()
        if shares:
            assert statistics.cached_tokens > 0
    theirs = await asyncio.to_thread(oracle, kind)
    expected = {given: await asyncio.to_thread(theirs, *given, 12) for given in MANY}
    assert len(set(expected.values())) == len(MANY), "the model does not tell them apart"
    for given, answer in zip(asks, answers, strict=True):
        assert answer.result().token_ids == expected[given]


@pytest.mark.parametrize("kind", KINDS)
async def test_prompts_are_those_of_the_models_own_processor(
    kind: str, vision_folder: Callable[[str], Path], oracle: Callable[[str], VisionOracle]
) -> None:
    theirs = await asyncio.to_thread(oracle, kind)
    async with engine_of(vision_folder(kind)) as engine:
        assert engine.reads_images
        for text, images in MANY[:5]:
            prompt = await engine.prompt(text, images)
            assert prompt.ids == theirs.ids(text, images)
            given = await engine.prompt(engine.tokenizer.encode(text), images)
            assert given.ids == prompt.ids


async def test_the_same_image_is_found_in_the_cache_and_another_is_not(
    vision_folder: Callable[[str], Path], oracle: Callable[[str], VisionOracle]
) -> None:
    text = "Look: <image>What is it? "
    theirs = await asyncio.to_thread(oracle, "llava")
    async with engine_of(vision_folder("llava"), page_size=4) as engine:
        first = await ask(engine, "first", (text, (RED,)))
        again = await ask(engine, "again", (text, (RED,)))
        other = await ask(engine, "other", (text, (BLUE,)))
    before = len(engine_ids := theirs.ids(text, (RED,))) - 1
    assert first.finish.cached_tokens == 0
    assert again.finish.cached_tokens >= before - 4
    begin = engine_ids.index(theirs.model.config.image_token_id)
    assert other.finish.cached_tokens <= begin
    assert first.token_ids == again.token_ids == theirs(text, (RED,), 12)
    assert other.token_ids == theirs(text, (BLUE,), 12) != first.token_ids


async def test_an_image_is_read_once_as_long_as_it_is_kept(
    vision_folder: Callable[[str], Path],
) -> None:
    async with engine_of(vision_folder("llava")) as engine:
        one = await engine.prompt("<image>", (RED,))
        two = await engine.prompt("Again: <image>", (RED,))
        other = await engine.prompt("<image>", (BLUE,))
    assert one.images[0].image is two.images[0].image
    assert other.images[0].image is not one.images[0].image


async def test_branches_of_one_prompt_share_its_image(
    vision_folder: Callable[[str], Path], oracle: Callable[[str], VisionOracle]
) -> None:
    theirs = await asyncio.to_thread(oracle, "idefics3")
    texts = [f"Look: <image>What is it? {end}" for end in ("A ", "B ", "C: ", "C: ")]
    async with engine_of(vision_folder("idefics3"), page_size=1) as engine:
        answers = await asyncio.gather(
            *(ask(engine, str(number), (text, (TALL,))) for number, text in enumerate(texts))
        )
        statistics = engine.statistics()
    for text, answer in zip(texts, answers, strict=True):
        assert answer.token_ids == theirs(text, (TALL,), 12)
    assert statistics.cached_tokens >= 3 * len(theirs.ids("Look: <image>", (TALL,)))


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
async def test_preempted_prompts_with_images_go_on_as_if_nothing_had_happened(
    kind: str, vision_folder: Callable[[str], Path], oracle: Callable[[str], VisionOracle]
) -> None:
    theirs = await asyncio.to_thread(oracle, kind)
    sampling = Sampling(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    engine = engine_of(vision_folder(kind), max_total_tokens=160, page_size=4)
    async with engine:
        prompts = [await engine.prompt(*given) for given in MANY[:4]]
        requests = [
            Request(str(number), prompt.ids, sampling, images=prompt.images)
            for number, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
        assert engine.statistics().preemptions > 0
    for given, answer in zip(MANY, answers, strict=False):
        assert answer.token_ids == theirs(*given, 30)


async def test_streamed_tokens_are_the_same(
    vision_folder: Callable[[str], Path], oracle: Callable[[str], VisionOracle]
) -> None:
    theirs = await asyncio.to_thread(oracle, "llava_next")
    text = "Look: <image>"
    async with engine_of(vision_folder("llava_next")) as engine:
        prompt = await engine.prompt(text, (RED,))
        request = Request("s", prompt.ids, GREEDY, stream=True, images=prompt.images)
        deltas = [delta async for delta in engine.stream(request)]
    assert len(deltas) > 3
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    assert tokens == theirs(text, (RED,), 12)


async def test_prompt_logprobs_are_those_of_the_whole_model(
    vision_folder: Callable[[str], Path], oracle: Callable[[str], VisionOracle]
) -> None:
    theirs = await asyncio.to_thread(oracle, "llava")
    text, scored = "Look: <image>What", 9
    async with engine_of(vision_folder("llava"), chunked_prefill_size=5) as engine:
        start = len(theirs.ids(text, (RED,))) - scored
        answer = await ask(
            engine, "l", (text, (RED,)), return_logprob=True, logprob_start_len=start
        )
    with torch.inference_mode():
        inputs = theirs.inputs(text, (RED,))
        logprobs = theirs.model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    expected = [float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))]
    found = [entry.logprob for entry in answer.prompt_logprobs]
    assert found == pytest.approx(expected, abs=2e-3)
    assert [entry.token_id for entry in answer.prompt_logprobs] == ids[start:].tolist()


# -- what is refused -------------------------------------------------------------------------------


def moving() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    assert buffer.tell() < 100_000
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("text", "images", "problem"),
    [
        ("<image>", (RED, BLUE), "1 places for 2 images; each image stands where '<image>' is"),
        ("no place", (RED,), "0 places for 1 images"),
        ("<image>" * 5, (RED,) * 5, "has 5 images, at most 4 are read"),
        ("<image>", (b"%PDF-1.7",), "not a whole PNG, JPEG, WEBP, GIF file"),
        ("<image>", (RED[:60],), "not a whole PNG"),
        ("<image>", (picture(1, form="BMP"),), "not a whole PNG"),
        ("<image>", (moving(),), "an image moves"),
        ("<image>", (bomb(),), "an image has too many pixels, at most 1000000 are read"),
        ("<image>", (picture(1, 2000, 1000),), "2000 x 1000 pixels, at most 1000000 are read"),
    ],
    ids=["places", "no-place", "many", "pdf", "cut", "bmp", "moving", "bomb", "large"],
)
async def test_images_that_are_refused(
    text: str, images: Sequence[bytes], problem: str, vision_folder: Callable[[str], Path]
) -> None:
    async with engine_of(
        vision_folder("llava"), max_images=4, max_image_pixels=1_000_000
    ) as engine:
        with pytest.raises(InvalidRequest, match=problem):
            await engine.prompt(text, images)


async def test_a_prompt_whose_images_do_not_fit_is_refused(
    vision_folder: Callable[[str], Path],
) -> None:
    async with engine_of(vision_folder("llava"), context_length=40) as engine:
        assert len((await engine.prompt("<image>", (RED,))).ids) == 16
        with pytest.raises(PromptTooLong, match="has 48 tokens, at most 39 fit"):
            await engine.prompt("<image><image><image>", (RED, BLUE, TALL))


async def test_images_take_no_more_memory_than_they_may(
    vision_folder: Callable[[str], Path],
) -> None:
    size = 16 * 64 * 4
    async with engine_of(vision_folder("llava"), image_memory=2 * size) as engine:
        held = [await engine.prompt("<image>", (picture(seed),)) for seed in (1, 2)]
        with pytest.raises(ImagesOverloaded, match=f"take {2 * size} bytes of {2 * size}"):
            await engine.prompt("<image>", (picture(3),))
        held.pop()
        await engine.prompt("<image>", (picture(3),))
    async with engine_of(vision_folder("llava"), image_memory=size - 1) as engine:
        with pytest.raises(InvalidRequest, match=f"takes {size} bytes"):
            await engine.prompt("<image>", (RED,))


async def test_prompts_in_line_end_with_the_engine_and_leave_when_cancelled(
    vision_folder: Callable[[str], Path],
) -> None:
    engine = engine_of(vision_folder("idefics3"), max_queued_requests=200)
    await engine.start()
    asks = [asyncio.ensure_future(engine.prompt("<image>", (picture(n),))) for n in range(260)]
    await asyncio.sleep(0)
    asks[199].cancel()
    await engine.aclose()
    ends = await asyncio.gather(*asks, return_exceptions=True)
    assert isinstance(ends[199], asyncio.CancelledError)
    others = [end for end in ends if isinstance(end, BaseException) and end is not ends[199]]
    assert {type(end) for end in others} == {Closed, Overloaded}
    assert "200 requests are waiting" in str(next(e for e in others if isinstance(e, Overloaded)))


async def test_a_text_model_says_that_it_reads_no_images(
    model_folder: Callable[[str], Path],
) -> None:
    async with engine_of(model_folder("llama")) as engine:
        assert not engine.reads_images
        with pytest.raises(InvalidRequest, match="reads text only"):
            await engine.prompt("<image>", (RED,))


def test_a_model_with_positions_in_three_dimensions_is_refused(tmp_path: Path) -> None:
    config = Qwen2VLConfig(
        text_config={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            }
        }
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'qwen2_vl' are not run: .*M-RoPE.* llava, "):
        load_model(tmp_path, torch.float32, torch.device("cpu"))


def test_pillow_is_named_where_it_is_missing(vision_folder: Callable[[str], Path]) -> None:
    code = f"""
import asyncio, importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "PIL" or name.startswith("PIL."):
            raise ModuleNotFoundError("no Pillow", name=name)

sys.meta_path.insert(0, Missing())

async def main():
    from asyncsgl_engine.engine import AsyncEngine
    from asyncsgl_engine.config import EngineConfig
    from asyncsgl_engine.request import Request, Sampling

    config = EngineConfig({str(vision_folder("llava"))!r}, dtype="float32", num_threads=1)
    async with AsyncEngine(config) as engine:
        ids = tuple(engine.tokenizer.encode("text goes on"))
        print(len((await engine.generate(Request("t", ids, Sampling(4, ignore_eos=True)))).token_ids))
        try:
            await engine.prompt("<image>", (b"",))
        except ValueError as error:
            print(error)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[:1] == ["4"], done.stderr
    assert "pip install 'asyncsgl[images]'" in done.stdout


# -- files and processors --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pixels_are_those_that_transformers_loads(form: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(picture(4, 50, 30, form))
    with Image.open(path) as opened:
        theirs = load_image(opened)
    assert decode_image(path.read_bytes(), 10_000).tobytes() == theirs.tobytes()


def test_a_photograph_is_turned_upright() -> None:
    image = Image.open(io.BytesIO(picture(4, 50, 30)))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), 10_000).size == (30, 50)


async def test_smolvlm_needs_no_torchvision(
    tmp_path: Path, oracle: Callable[[str], VisionOracle]
) -> None:
    folder = save_vision_model("smolvlm", tmp_path)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    assert config["processor_class"] == "Idefics3Processor"
    path.write_text(json.dumps({**config, "processor_class": "SmolVLMProcessor"}))
    theirs = await asyncio.to_thread(oracle, "smolvlm")
    async with engine_of(folder) as engine:
        prompt = await engine.prompt("<image>", (RED,))
        written: Any = get_image_prompt_string
        expected = written(2, 2, 4, "<fake_token_around_image>", "<image>", "<global-img>")
        assert prompt.ids == tuple(engine.tokenizer.encode(expected))
        answer = await ask(engine, "a", MANY[2])
    assert answer.token_ids == theirs(*MANY[2], 12)


async def test_the_processors_chat_template_is_the_tokenizers(tmp_path: Path) -> None:
    folder = save_vision_model("llava", tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    async with engine_of(folder) as engine:
        assert engine.tokenizer.chat_template == template
        assert engine.tokenizer.special_tokens["image_token"] == "<image>"
