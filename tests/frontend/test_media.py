"""Images and video: any source, known by content, kept in place, read off the event loop."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy
import PIL.Image
import pytest

import asyncsgl as sgl
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Media

pytestmark = pytest.mark.anyio


def picture(form: str = "PNG", colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), colour).save(buffer, form)
    return buffer.getvalue()


def clip(frames: int = 12) -> bytes:
    """A video whose frames get brighter from black to white."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height = 32, 32
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            level = 255 * index // max(frames - 1, 1)
            array = numpy.full((32, 32, 3), level, numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def brightness(frame: bytes) -> float:
    return float(numpy.asarray(PIL.Image.open(io.BytesIO(frame))).mean())


async def media_of(*nodes: Any) -> Sequence[Media | str]:
    """The parts of the user's turn that reach the backend."""

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        with s.user():
            for node in nodes:
                s += node
        s += sgl.assistant(sgl.gen("x"))

    backend = ScriptedBackend("x")
    await program.run(backend=backend)
    return backend.requests[0].messages[0].parts


async def test_every_kind_of_source_gives_the_same_image(tmp_path: Path) -> None:
    data = picture()
    path = tmp_path / "cat.jpeg"
    path.write_bytes(data)
    coded = base64.b64encode(data).decode()
    percent = "".join(f"%{byte:02x}" for byte in data)
    sources: list[Any] = [data, path, str(path), f"data:image/png;base64,{coded}"]
    sources += [f"data:image/png,{percent}", PIL.Image.open(io.BytesIO(data))]
    for source in sources:
        [media] = await media_of(sgl.image(source))
        assert isinstance(media, Media)
        assert (media.kind, media.media_type, media.url) == ("image", "image/png", None)
        assert media.data is not None
        with PIL.Image.open(io.BytesIO(media.data)) as image:
            assert (image.size, image.getpixel((0, 0))) == ((4, 3), (255, 0, 0))


async def test_a_url_stays_a_url() -> None:
    [media] = await media_of(sgl.image("https://example.org/cat.png"))
    assert media == Media("image", url="https://example.org/cat.png", name=media.name)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "media_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("GIF", "image/gif"),
        ("BMP", "image/bmp"),
        ("WEBP", "image/webp"),
        ("TIFF", "image/tiff"),
    ],
)
async def test_the_type_is_found_from_the_content(
    form: str, media_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrongly-named.txt"
    path.write_bytes(picture(form))
    [media] = await media_of(sgl.image(path))
    assert isinstance(media, Media)
    assert media.media_type == media_type


async def test_several_images_keep_their_places() -> None:
    one, two = picture(colour="red"), picture(colour="blue")
    parts = await media_of("a" + sgl.image(one) + "b", sgl.image(two), "c")
    shown = [part if isinstance(part, str) else part.data for part in parts]
    assert shown == ["a", one, "b", two, "c"]


async def test_images_in_the_finished_state() -> None:
    data = picture()

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.user("a" + sgl.image(data) + sgl.image("http://x/y.png") + "b" + "c")
        s += sgl.assistant(sgl.gen("x"))

    state = await program.run(backend=ScriptedBackend("!"))
    content = state.messages()[0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url", "text"]
    url = content[1]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == data
    assert content[2]["image_url"]["url"] == "http://x/y.png"
    assert content[3]["text"] == "bc"
    assert state.text() == "USER:a<image><image>bc\nASSISTANT:!\n"


async def test_unusable_files_are_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    large = tmp_path / "large.png"
    large.write_bytes(picture() + b"\0" * 1000)
    cases: list[tuple[Any, str]] = [
        (sgl.image(tmp_path / "gone.png"), r"cannot read .*gone\.png: No such file"),
        (sgl.image(tmp_path), "cannot read .*: Is a directory"),
        (sgl.image(text), r"notes\.png is not image data"),
        (sgl.image(large, max_bytes=1000), r"large\.png is larger than the limit of 1,000 bytes"),
        (sgl.image(large.read_bytes(), max_bytes=1000), "the limit is 1,000"),
        (sgl.image("data:image/png;base64,!!"), "not base64"),
        (sgl.image("data:image/png"), "no comma"),
        (sgl.image(clip()), "but video/mp4"),
        (sgl.image("a\0b.png"), "cannot read"),
    ]
    for node, words in cases:
        with pytest.raises(sgl.InvalidArgument, match=words):
            await media_of(node)


@pytest.mark.parametrize("source", [None, 5, b"", "", ["a.png"]])
def test_what_is_no_source_is_refused_at_the_line(source: Any) -> None:
    with pytest.raises(sgl.InvalidArgument, match="must be a path, a URL, bytes"):
        sgl.image(source)
    with pytest.raises(sgl.InvalidArgument, match="must be a path, a URL, bytes"):
        sgl.video(source, 4)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (4, 4), (12, 12), (50, 12), (-1, 12)])
async def test_a_video_is_sampled_evenly(count: int, expected: int, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(clip())
    [media] = await media_of(sgl.video(path, num_frames=count))
    assert isinstance(media, Media)
    assert (media.kind, media.media_type) == ("video", "video/mp4")
    levels = [brightness(frame) for frame in media.frames]
    assert len(levels) == expected
    assert levels == sorted(levels)
    middle = sum(levels) / len(levels)
    assert middle == pytest.approx(127, abs=20), "from the whole of the video"


async def test_unusable_videos_are_refused(tmp_path: Path) -> None:
    for frames in (0, -2, 513, 1.5, True):
        with pytest.raises(sgl.InvalidArgument, match="num_frames"):
            sgl.video(b"x", frames)  # type: ignore[arg-type]
    with pytest.raises(sgl.InvalidArgument, match="local file, bytes or a data URL"):
        sgl.video("https://example.org/a.mp4", 2)
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(clip()[:200])
    with pytest.raises(sgl.InvalidArgument, match=r"cannot decode .*torn\.mp4"):
        await media_of(sgl.video(torn, 2))
    with pytest.raises(sgl.InvalidArgument, match="is not video data"):
        await media_of(sgl.video(picture(), 2))
