"""The images of a program's requests, as files for the local engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import BadRequestError, InvalidArgument
from ..types import GenRequest, Media

if TYPE_CHECKING:
    from asyncsgl_engine.server.settings import ServerSettings

__all__ = ["RuntimeImages", "checked_settings", "images_of"]


def checked_settings(given: Mapping[str, object] | None) -> ServerSettings:
    """A server's settings, by their names.

    Raises:
        InvalidArgument: one is unknown or out of its range.
    """
    from asyncsgl_engine.errors import ConfigError
    from asyncsgl_engine.server.settings import ServerSettings

    try:
        return ServerSettings(**dict(given or {}))  # type: ignore[arg-type]
    except ConfigError as error:
        field, _, problem = str(error).partition(": ")
        raise InvalidArgument(field, problem) from error
    except TypeError as error:
        raise InvalidArgument("server_settings", f"no such setting: {error}") from error


def images_of(request: GenRequest) -> list[Media]:
    """The images of a request, in their order."""
    return [
        part
        for message in request.messages
        for part in message.parts
        if isinstance(part, Media) and part.kind == "image"
    ]


class RuntimeImages:
    """Gets the files of images.

    What a program names by path was read when it was appended. Addresses are fetched here, by
    the rules for those that the server's clients name: they may come from a program's users.

    Args:
        settings: which hosts images may be fetched from, and how large they may be.
        backend: its name, for errors.
    """

    def __init__(self, settings: ServerSettings, backend: str) -> None:
        self._settings = settings
        self._backend = backend

    async def file(self, image: Media) -> bytes:
        """The bytes of an image.

        Raises:
            BadRequestError: it has only an address, and may not be fetched or cannot be.
        """
        if image.data is not None:
            return image.data
        from asyncsgl_engine.errors import InvalidRequest
        from asyncsgl_engine.server.media import MediaReader

        assert image.url is not None, "an image has bytes or an address"
        try:
            return await MediaReader(self._settings).read(image.url)
        except InvalidRequest as error:
            raise BadRequestError(
                f"{error}; give the image's bytes, or name its host in "
                "Runtime(server_settings={'allow_media_domains': [...]})",
                backend=self._backend,
            ) from error
