"""Where calls in OpenAI's language go, and by whose leave: OpenAI, Azure, or another server."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from ..errors import InvalidArgument

__all__ = ["Account", "Provider"]

Provider = Callable[[], str] | Callable[[], Awaitable[str]]
"""Gives a key or token for each call; one that may block runs in a thread."""

_OPENAI = "api.openai.com"
_OTHER_CREDENTIALS = frozenset({"admin_api_key", "workload_identity"})


@dataclass(frozen=True, slots=True)
class Account:
    """Where calls go, and by whose leave.

    Args:
        name: ``"openai"`` or ``"azure"``, as messages call it.
        place: the service or the server's address.
        key: the key, where it is known.
        hosted: OpenAI itself answers.
        priced_as: the provider or address whose price list holds.
        by_deployment: the address has the deployment in it, as Azure's older form wants.
        arguments: for the SDK's client.
    """

    name: Literal["openai", "azure"]
    place: str
    key: str | None = field(repr=False)
    hosted: bool
    priced_as: str
    by_deployment: bool
    arguments: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of_openai(
        cls, key: str | Provider | None, base_url: str | None, more: Mapping[str, Any]
    ) -> Self:
        """OpenAI, or a server with the same API.

        Raises:
            InvalidArgument: there is no key.
        """
        key = key or os.environ.get("OPENAI_API_KEY")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not _OTHER_CREDENTIALS & set(more):
            raise InvalidArgument("api_key", "give it, or set OPENAI_API_KEY")
        host = None if base_url is None else urlsplit(base_url).hostname or ""
        hosted = host is None or host == _OPENAI or host.endswith(f".{_OPENAI}")
        return cls(
            "openai",
            base_url or "openai",
            _known(key),
            hosted,
            "openai" if hosted else base_url or "",
            by_deployment=False,
            arguments={**more, "api_key": _awaitable(key), "base_url": base_url},
        )

    @classmethod
    def of_azure(
        cls,
        key: str | Provider | None,
        base_url: str | None,
        endpoint: str | None,
        api_version: str | None,
        token_provider: Provider | None,
        more: Mapping[str, Any],
    ) -> Self:
        """Azure OpenAI, in the older form where there is an ``api_version``.

        Raises:
            InvalidArgument: there is no address, or no key or token.
        """
        token = more.get("azure_ad_token") or os.environ.get("AZURE_OPENAI_AD_TOKEN")
        more = {name: value for name, value in more.items() if name != "azure_ad_token"}
        if not (key or token_provider or token):
            key = os.environ.get("AZURE_OPENAI_API_KEY")
        endpoint = endpoint or os.environ.get("AZURE_OPENAI_ENDPOINT")
        address = base_url or endpoint
        if not address:
            raise InvalidArgument(
                "azure_endpoint", "give it, or set AZURE_OPENAI_ENDPOINT, for is_azure=True"
            )
        credential = key or token_provider or token
        if not credential:
            raise InvalidArgument(
                "api_key", "give it or azure_ad_token_provider, or set AZURE_OPENAI_API_KEY"
            )
        if api_version is None:
            url = base_url or f"{address.rstrip('/')}/openai/v1/"
            arguments = {"base_url": url, "api_key": _awaitable(credential)}
        else:
            arguments = {
                "base_url": base_url,
                "azure_endpoint": endpoint if base_url is None else None,
                "api_version": api_version,
            }
            if key:
                arguments["api_key"] = _awaitable(key)
            else:
                provider = _awaitable(token_provider) if token_provider else None
                arguments |= {"azure_ad_token_provider": provider}
                arguments |= {"azure_ad_token": None if provider else token}
        return cls(
            "azure",
            address,
            _known(key) or _known(token),
            hosted=False,
            priced_as="azure",
            by_deployment=api_version is not None,
            arguments={**more, **arguments},
        )


def _known(credential: object) -> str | None:
    return credential if isinstance(credential, str) else None


def _awaitable(credential: str | Provider | None) -> str | Callable[[], Awaitable[str]] | None:
    """The credential as the SDK's asynchronous client takes it: it calls nothing that blocks."""
    if credential is None or isinstance(credential, str):
        return credential

    async def given() -> str:
        if inspect.iscoroutinefunction(credential):
            found = await credential()
        else:
            found = await asyncio.to_thread(credential)
            if inspect.isawaitable(found):
                found = await found
        return str(found)

    return given
