"""Images in requests: inline, from an allowed folder and from allowed hosts."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import asyncsgl as sgl
from asyncsgl_engine.server import ServerSettings
from asyncsgl_engine.server.app import create_app, service_of
from asyncsgl_engine.server.lifecycle import BackgroundServer
from asyncsgl_engine.server.media import MediaReader
from asyncsgl_engine.server.settings import Address
from tests.engine.tiny_vision import VisionOracle, picture, save_vision_model

from .conftest import Served, serving, tiny_engine
from .process import ServerProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

RED, BLUE, TALL = picture(1), picture(2), picture(3, 30, 90)
GREEDY = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
TEXT = "Look: <image>What is it? "

Answer = Callable[..., str]


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def answer(vision_model: Path) -> Answer:
    """What transformers answers: `answer(text, *images)`."""
    oracle = VisionOracle(vision_model)

    @cache
    def text_of(text: str, *images: bytes) -> str:
        tokens = oracle(text, images, 8)
        return str(oracle.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    return text_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that may be read, beside one that may not."""
    outside = tmp_path_factory.mktemp("files")
    inside = outside / "media"
    inside.mkdir()
    (inside / "red.png").write_bytes(RED)
    (inside / "text.png").write_bytes(b"no image")
    (inside / "large.png").write_bytes(RED + bytes(1 << 20))
    (outside / "secret.png").write_bytes(BLUE)
    (inside / "link.png").symlink_to(outside / "secret.png")
    return inside


@pytest.fixture(scope="module")
def seeing(vision_model: Path, folder: Path) -> Iterator[Served]:
    """A model that reads images, behind a socket, with a folder it may read."""
    with ExitStack() as stack:
        settings = ServerSettings("tiny", allow_local_media=folder, max_media_bytes=1 << 20)
        engine = tiny_engine(vision_model, debug_check=True, max_images=8)
        yield serving(stack, engine, settings)


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["param"] in ("image_data", "messages")
    return str(error["message"])


# -- /generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        data_url(RED),
        base64.b64encode(RED).decode(),
        [data_url(RED)],
        {"url": data_url(RED)},
        "./red.png",
    ],
    ids=["data-url", "base64", "list", "dict", "path"],
)
def test_one_prompt_with_one_image(seeing: Served, answer: Answer, named: Any) -> None:
    found = seeing.generate(TEXT, image_data=named, sampling_params=GREEDY)
    assert found["text"] == answer(TEXT, RED)
    seeing.assert_idle()


def test_one_prompt_with_a_list_of_images(seeing: Served, answer: Answer) -> None:
    text = "<image>and <image>: "
    named = [data_url(RED), data_url(TALL)]
    found = seeing.generate(text, image_data=named, sampling_params=GREEDY)
    assert found["text"] == answer(text, RED, TALL)
    several = {**GREEDY, "n": 2}  # for which SGLang wants a list of lists
    found = seeing.generate(text, image_data=[named], sampling_params=several)
    assert [each["text"] for each in found] == [answer(text, RED, TALL)] * 2


@pytest.mark.parametrize(
    ("named", "images"),
    [
        ([data_url(RED), data_url(BLUE)], ((RED,), (BLUE,))),
        ([[data_url(RED), data_url(BLUE)], [data_url(TALL)]], ((RED, BLUE), (TALL,))),
        (data_url(RED), ((RED,), (RED,))),
        ([None, data_url(RED)], ((), (RED,))),
        ([[], [data_url(RED)]], ((), (RED,))),
        ([], ((), ())),
    ],
    ids=["one-each", "lists", "one-for-all", "null", "empty", "none"],
)
def test_a_list_of_prompts_takes_its_images_by_place(
    seeing: Served, answer: Answer, named: Any, images: tuple[tuple[bytes, ...], ...]
) -> None:
    texts = [f"Look: {'<image>' * len(each)} at it " for each in images]
    found = seeing.generate(texts, image_data=named, sampling_params=GREEDY)
    expected = [answer(text, *each) for text, each in zip(texts, images, strict=True)]
    assert [each["text"] for each in found] == expected


def test_samples_token_ids_and_streams(seeing: Served, answer: Answer) -> None:
    expected = answer(TEXT, BLUE)
    image = data_url(BLUE)
    found = seeing.generate(TEXT, image_data=image, sampling_params={**GREEDY, "n": 2})
    assert [each["text"] for each in found] == [expected, expected]
    ids = seeing.engine.tokenizer.encode(TEXT)
    found = seeing.generate(None, input_ids=ids, image_data=image, sampling_params=GREEDY)
    assert found["text"] == expected
    assert found["meta_info"]["prompt_tokens"] == len(ids) + 15
    body = {"text": TEXT, "image_data": image, "sampling_params": GREEDY, "stream": True}
    with httpx.stream("POST", f"{seeing.url}/generate", json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert json.loads(lines[-1].removeprefix("data: "))["text"] == expected


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"text": "none here", "image_data": data_url(RED)}, "0 places for 1 images"),
        ({"text": TEXT, "image_data": [data_url(RED)] * 2}, "1 places for 2 images"),
        ({"text": TEXT, "image_data": [data_url(RED)] * 9}, "at most 8 are read"),
        ({"text": [TEXT, TEXT], "image_data": [data_url(RED)]}, "1 entries for 2 prompts"),
        ({"text": TEXT, "image_data": {"format": "processor_output"}}, "an image is a data URL"),
        ({"text": TEXT, "image_data": 7}, "an image is a data URL"),
        ({"text": TEXT, "image_data": data_url(b"text")}, "not a whole PNG"),
        ({"text": TEXT, "image_data": "data:image/png;base64,%%%"}, "neither base64"),
        ({"text": TEXT, "image_data": "http://localhost/cat.png"}, "fetches nothing from"),
        ({"text": TEXT, "image_data": "../secret.png"}, "no such file"),
        ({"text": TEXT, "image_data": "./link.png"}, "no such file"),
        ({"text": TEXT, "image_data": "file:///etc/passwd"}, "no such file"),
        ({"text": TEXT, "image_data": "./large.png"}, "more than 1048576 bytes"),
        ({"text": TEXT, "image_data": "./text.png"}, "not a whole PNG"),
    ],
)
def test_what_is_refused(seeing: Served, body: dict[str, Any], problem: str) -> None:
    assert problem in refusal(seeing.post("/generate", **body))
    seeing.assert_idle()


def test_a_model_of_text_refuses_images(served: Served) -> None:
    body = {"text": "<image>", "image_data": data_url(RED)}
    assert "reads text only" in refusal(served.post("/generate", **body))
    assert served.get("/model_info").json()["has_image_understanding"] is False


# -- OpenAI's chat -----------------------------------------------------------------------------------


def chat(*content: Any) -> list[Any]:
    return [{"role": "user", "content": list(content)}]


def shown(image: bytes | str) -> dict[str, Any]:
    url = image if isinstance(image, str) else data_url(image)
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 8,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(seeing: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="-", max_retries=0) as made:
        yield made


def test_the_official_client_shows_images(client: openai.OpenAI, answer: Answer) -> None:
    done = client.chat.completions.create(messages=chat(shown(RED), said("What?")), **ASK)
    expected = answer("USER: <image>\nWhat? ASSISTANT: ", RED)
    assert done.choices[0].message.content == expected
    assert done.usage is not None
    assert done.usage.prompt_tokens > 16
    chunks = client.chat.completions.create(
        messages=chat(said("What?"), shown("./red.png")), stream=True, **ASK
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected


def test_an_image_of_an_earlier_turn_stays(client: openai.OpenAI, answer: Answer) -> None:
    messages = [
        *chat(shown(RED), said("One?")),
        {"role": "assistant", "content": "A square."},
        *chat(said("And "), said("this?"), shown(BLUE)),
    ]
    done = client.chat.completions.create(messages=messages, n=2, **ASK)
    text = "USER: <image>\nOne? ASSISTANT: A square. USER: <image>\nAnd this? ASSISTANT: "
    assert [each.message.content for each in done.choices] == [answer(text, RED, BLUE)] * 2


def test_turns_of_text_are_shown_by_a_template_of_parts(
    client: openai.OpenAI, answer: Answer
) -> None:
    done = client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **ASK)
    assert done.choices[0].message.content == answer("USER: Hi ASSISTANT: ")


def test_the_official_client_is_told_what_is_wrong(client: openai.OpenAI) -> None:
    for part, problem in (
        (shown(b"text"), "not a whole PNG"),
        (shown("/etc/passwd"), "no such file"),
        ({"type": "input_audio", "input_audio": {}}, "a part of type 'input_audio'"),
    ):
        with pytest.raises(openai.BadRequestError, match=problem) as caught:
            client.chat.completions.create(messages=chat(part), **ASK)
        assert caught.value.param == "messages"


def test_a_chat_with_images_is_counted_in_tokens(seeing: Served, client: openai.OpenAI) -> None:
    messages = chat(shown(RED), said("What?"))
    counted = seeing.post("/v1/tokenize", messages=messages).json()
    done = client.chat.completions.create(messages=messages, **ASK)
    assert done.usage is not None
    assert counted["count"] == done.usage.prompt_tokens


# -- our own client, and URLs ------------------------------------------------------------------------


async def test_a_program_on_the_endpoint_sends_its_images(seeing: Served, answer: Answer) -> None:
    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        s += sgl.user(sgl.image(RED) + "What?")
        s += sgl.assistant(sgl.gen("it", max_tokens=8, temperature=0, ignore_eos=True))

    @sgl.function
    async def raw(s: sgl.ProgramState) -> None:
        s += "Look: " + sgl.image(BLUE)
        s += sgl.gen("it", max_tokens=8, temperature=0, ignore_eos=True)

    async with sgl.RuntimeEndpoint(seeing.url) as endpoint:
        state = await look.run(backend=endpoint)
        assert state["it"] == await asyncio.to_thread(
            answer, "USER: <image>\nWhat? ASSISTANT: ", RED
        )
        state = await raw.run(backend=endpoint)
        assert state["it"] == await asyncio.to_thread(answer, "Look: <image>", BLUE)


class Site(BaseHTTPRequestHandler):
    """Gives an image, something else, or the way to another address."""

    def do_GET(self) -> None:
        name, _, rest = self.path.lstrip("/").partition("/")
        self.send_response(302 if name == "to" else 200)
        if name == "to":
            self.send_header("Location", rest)
        self.end_headers()
        if name == "red.png":
            self.wfile.write(RED)
        elif name == "endless":
            self.wfile.write(bytes(200_000))
        elif name == "text":
            self.wfile.write(b"text")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def open_to_itself(vision_model: Path) -> Iterator[str]:
    """A server that may fetch from localhost, as if 127.0.0.1 were on the open internet."""
    with ExitStack() as stack:
        engine = tiny_engine(vision_model)
        stack.callback(engine.shutdown)
        settings = ServerSettings(allow_media_domains=("localhost",), max_media_bytes=100_000)
        app = create_app(engine, settings)
        service_of(app).media = MediaReader(settings, lambda address: str(address) == "127.0.0.1")
        server = BackgroundServer(app, Address(port=0))
        stack.callback(server.stop)
        yield asyncio.run(server.start())


def test_images_are_fetched_from_allowed_hosts(
    open_to_itself: str, site: str, answer: Answer
) -> None:
    def post(url: str) -> httpx.Response:
        body = {"text": TEXT, "image_data": url, "sampling_params": GREEDY}
        return httpx.post(f"{open_to_itself}/generate", json=body, timeout=60)

    assert post(f"{site}/red.png").json()["text"] == answer(TEXT, RED)
    assert post(f"{site}/to/{site}/red.png").json()["text"] == answer(TEXT, RED)
    for url, problem in (
        (f"{site}/to/http://169.254.169.254/latest", "fetches nothing from 169.254.169.254"),
        (f"{site}/to/http://127.0.0.1/red.png", "fetches nothing from 127.0.0.1"),
        (f"{site}/to/file:///etc/passwd", "fetches nothing"),
        (f"{site}/endless", "more than 100000 bytes"),
        (f"{site}/text", "not a whole PNG"),
        ("http://example.org/cat.png", "fetches nothing from example.org"),
    ):
        assert problem in refusal(post(url)), url


def test_flags_open_a_folder_and_hosts(
    start: Callable[..., ServerProcess], vision_model: Path, folder: Path, site: str, answer: Answer
) -> None:
    server = start(
        *("asyncsgl", "serve", "--model", str(vision_model), "--port", "0"),
        *("--allow-local-media", str(folder), "--allow-media-domains", "localhost"),
        *("--dtype", "float32", "--max-total-tokens", "4096", "--no-batches"),
    )
    url = server.url

    def post(named: str) -> httpx.Response:
        body = {"text": TEXT, "image_data": named, "sampling_params": GREEDY}
        return httpx.post(f"{url}/generate", json=body, timeout=60)

    assert httpx.get(f"{url}/model_info").json()["has_image_understanding"] is True
    assert post(str(folder / "red.png")).json()["text"] == answer(TEXT, RED)
    assert "no such file" in refusal(post(str(folder.parent / "secret.png")))
    assert "localhost is not on the open internet" in refusal(post(f"{site}/red.png"))
