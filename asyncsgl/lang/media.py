"""Images and video: from paths, URLs, bytes, PIL images and data URLs to bytes with a type."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote_to_bytes

from ..errors import InvalidArgument, MissingDependency
from ..types import Media

__all__ = ["MediaSource", "load_image", "load_video", "name_of", "sniff"]

MAX_IMAGE_BYTES = 20 * 2**20
MAX_VIDEO_BYTES = 200 * 2**20
MAX_FRAMES = 512


@runtime_checkable
class PILImage(Protocol):
    """The part of PIL's image that is used here."""

    def save(self, fp: io.BytesIO, format: str) -> None:  # noqa: A002 - PIL's name
        """Write the image."""


MediaSource = str | os.PathLike[str] | bytes | PILImage

_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF87a", "image/gif"),
    (0, b"GIF89a", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftypheic", "image/heic"),
    (4, b"ftypheix", "image/heic"),
    (4, b"ftypmif1", "image/heic"),
    (4, b"ftypqt", "video/quicktime"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1aE\xdf\xa3", "video/webm"),
    (8, b"AVI ", "video/x-msvideo"),
)


def sniff(data: bytes) -> str | None:
    """The media type of ``data`` by its first bytes; None if it is not a known one."""
    for offset, magic, media_type in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return media_type
    return None


def name_of(source: MediaSource) -> str:
    """How error messages call ``source``."""
    if isinstance(source, str):
        return source if len(source) <= 100 else source[:97] + "..."
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return type(source).__name__


def load_image(source: MediaSource, max_bytes: int | None = None) -> Callable[[], Awaitable[Media]]:
    """A coroutine function that reads ``source`` off the event loop.

    Raises:
        InvalidArgument: ``source`` is not a kind of image source.
    """
    _check_source("image", source)
    limit = MAX_IMAGE_BYTES if max_bytes is None else max_bytes
    name = name_of(source)

    async def load() -> Media:
        if _is_url(source):
            return Media("image", url=str(source), name=name)
        data = await asyncio.to_thread(_read, "image", source, name, limit)
        return Media("image", data, _typed("image", data, name), name=name)

    return load


def load_video(
    source: MediaSource, num_frames: int, max_bytes: int | None = None
) -> Callable[[], Awaitable[Media]]:
    """A coroutine function that reads ``source`` and samples frames, off the event loop.

    Raises:
        InvalidArgument: an argument is unusable.
    """
    _check_source("video", source)
    if isinstance(num_frames, bool) or not isinstance(num_frames, int):
        raise InvalidArgument("num_frames", f"must be a whole number, got {num_frames!r}")
    if num_frames != -1 and not 1 <= num_frames <= MAX_FRAMES:
        raise InvalidArgument("num_frames", f"must be 1 to {MAX_FRAMES}, or -1, got {num_frames}")
    if _is_url(source):
        raise InvalidArgument("video", "a video must be a local file, bytes or a data URL")
    limit = MAX_VIDEO_BYTES if max_bytes is None else max_bytes
    name = name_of(source)

    def read() -> Media:
        data = _read("video", source, name, limit)
        media_type = _typed("video", data, name)
        return Media("video", data, media_type, name=name, frames=_frames(data, num_frames, name))

    async def load() -> Media:
        return await asyncio.to_thread(read)

    return load


def _check_source(kind: str, source: object) -> None:
    if not isinstance(source, (str, os.PathLike, bytes, PILImage)) or not source:
        raise InvalidArgument(
            kind, f"must be a path, a URL, bytes, a PIL image or a data URL, got {source!r}"
        )


def _is_url(source: MediaSource) -> bool:
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def _read(kind: str, source: MediaSource, name: str, limit: int) -> bytes:
    """The bytes of ``source``; runs in a thread."""
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str) and source.startswith("data:"):
        data = _from_data_url(kind, source)
    elif isinstance(source, (str, os.PathLike)):
        return _read_file(kind, Path(source), limit)
    else:
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        data = buffer.getvalue()
    if len(data) > limit:
        raise InvalidArgument(kind, f"{name} has {len(data):,} bytes; the limit is {limit:,}")
    return data


def _read_file(kind: str, path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgument(kind, f"cannot read {path}: {reason}") from error
    if len(data) > limit:
        raise InvalidArgument(kind, f"{path} is larger than the limit of {limit:,} bytes")
    return data


def _from_data_url(kind: str, url: str) -> bytes:
    header, comma, body = url[5:].partition(",")
    if not comma:
        raise InvalidArgument(kind, "the data URL has no comma")
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise InvalidArgument(kind, f"the data URL is not base64: {error}") from error


def _typed(kind: str, data: bytes, name: str) -> str:
    media_type = sniff(data)
    if media_type is None or not media_type.startswith(kind + "/"):
        found = media_type or "something else"
        raise InvalidArgument(kind, f"{name} is not {kind} data that is known here, but {found}")
    return media_type


def _frames(data: bytes, num_frames: int, name: str) -> tuple[bytes, ...]:
    """PNG frames sampled evenly over the video."""
    try:
        import av
        import PIL.Image  # noqa: F401 - av makes images with it
        from av.error import FFmpegError
    except ImportError as error:
        raise MissingDependency(error.name or "av", "video") from error
    try:
        with av.open(io.BytesIO(data), "r") as container:
            total = sum(1 for _ in container.decode(video=0))
        wanted = _spread(total, MAX_FRAMES if num_frames == -1 else num_frames)
        frames: list[bytes] = []
        with av.open(io.BytesIO(data), "r") as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    buffer = io.BytesIO()
                    picture = frame.to_image()  # type: ignore[no-untyped-call, unused-ignore]
                    picture.save(buffer, "PNG")
                    frames.append(buffer.getvalue())
    except (FFmpegError, OSError, ValueError, LookupError) as error:
        raise InvalidArgument("video", f"cannot decode {name}: {error}") from error
    if not frames:
        raise InvalidArgument("video", f"{name} has no frames")
    return tuple(frames)


def _spread(total: int, count: int) -> frozenset[int]:
    """``count`` indexes spread evenly over ``total``, each in the middle of its share."""
    if count >= total:
        return frozenset(range(total))
    return frozenset(int((i + 0.5) * total / count) for i in range(count))
