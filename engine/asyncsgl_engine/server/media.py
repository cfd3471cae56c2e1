"""Images that requests name: inline ones always, files and URLs only where that was allowed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from ..errors import InvalidRequest

if TYPE_CHECKING:
    import httpx

    from .settings import ServerSettings

__all__ = ["MediaReader", "is_public"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_REDIRECTS = 3
_TIMEOUT_S = 10.0
_INLINE_CHARACTERS = 1 << 16
"""Data URLs up to this length are decoded on the event loop: that takes less than a thread."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet: not this machine, not its network."""
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (inner is None or is_public(inner))


class MediaReader:
    """Reads the bytes of an image that a request names.

    Args:
        settings: what is allowed, and how large an image may be.
        may_reach: which addresses a host may have.
    """

    def __init__(
        self, settings: ServerSettings, may_reach: Callable[[Address], bool] = is_public
    ) -> None:
        self._folder = settings.allow_local_media
        self._hosts = frozenset(host.lower() for host in settings.allow_media_domains)
        self._limit = settings.max_media_bytes
        self._may_reach = may_reach

    async def read(self, source: str) -> bytes:
        """The bytes of an image.

        Args:
            source: a data URL or base64, the path of a file, or a URL.

        Raises:
            InvalidRequest: it is not allowed, not there, or too large.
        """
        kind = source[:8].lower()
        if kind.startswith("data:"):
            return await self._inline(source)
        if kind.startswith(("http://", "https://")):
            return await self._fetched(source)
        if kind.startswith("file:"):
            return await asyncio.to_thread(self._from_file, unquote(urlsplit(source).path))
        if source.startswith(("/", "./", "../")) and self._folder is not None:
            return await asyncio.to_thread(self._from_file, source)
        return await self._inline(f"data:;base64,{source}")

    async def _inline(self, url: str) -> bytes:
        if len(url) <= _INLINE_CHARACTERS:
            return self._decoded(url)
        return await asyncio.to_thread(self._decoded, url)

    def _decoded(self, url: str) -> bytes:
        head, comma, data = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _refused("a data URL must end its head with ';base64,'")
        if len(data) > self._limit * 4 // 3 + 4:
            raise self._too_large()
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise _refused(
                f"neither base64 nor a path or URL that this server may read ({error})"
            ) from error

    def _from_file(self, name: str) -> bytes:
        if self._folder is None:
            raise _refused("this server reads no files; start it with --allow-local-media FOLDER")
        folder = self._folder.resolve()
        path = (folder / Path(name)).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise _refused("there is no such file in the folder that this server may read")
        if path.stat().st_size > self._limit:
            raise self._too_large()
        return path.read_bytes()

    # -- URLs -----------------------------------------------------------------------------------

    async def _fetched(self, url: str) -> bytes:
        import httpx

        try:
            async with asyncio.timeout(_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as client:
                for _ in range(_REDIRECTS + 1):
                    found = await self._step(client, url)
                    if isinstance(found, bytes):
                        return found
                    url = urljoin(url, found)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise _refused(f"the URL could not be read: {type(error).__name__}") from error
        raise _refused(f"the URL redirects more than {_REDIRECTS} times")

    async def _step(self, client: httpx.AsyncClient, url: str) -> bytes | str:
        """The body at a URL, or where it redirects to."""
        import httpx

        parts = httpx.URL(url)
        if parts.scheme not in ("http", "https") or parts.host.lower() not in self._hosts:
            raise _refused(
                f"this server fetches nothing from {parts.host or 'there'}; "
                "start it with --allow-media-domains"
            )
        # Asked of the very address that was checked: a name may change its address meanwhile.
        request = client.build_request(
            "GET",
            parts.copy_with(host=str(await self._address(parts.host))),
            headers={"Host": parts.netloc.decode("ascii")},
            extensions={"sni_hostname": parts.host},
        )
        response = await client.send(request, stream=True)
        try:
            if response.is_redirect:
                return response.headers["location"]
            response.raise_for_status()
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > self._limit:
                    raise self._too_large()
            return bytes(body)
        finally:
            await response.aclose()

    async def _address(self, host: str) -> Address:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise _refused(f"{host} has no address") from error
        addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
        for address in addresses:
            if not self._may_reach(address):
                raise _refused(f"{host} is not on the open internet")
        return addresses[0]

    def _too_large(self) -> InvalidRequest:
        return _refused(f"it has more than {self._limit} bytes (max_media_bytes)")


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest("image", reason)
