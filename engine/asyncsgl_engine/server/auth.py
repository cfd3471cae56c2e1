"""Who may use which route."""

from __future__ import annotations

import hashlib
import hmac

from .failures import Failure
from .settings import ServerSettings

__all__ = ["Keys"]

_OPEN = ("/health", "/ready", "/metrics")
_ADMIN = frozenset(("/flush_cache", "/start_profile", "/stop_profile", "/abort_request"))


class Keys:
    """The keys a server asks for.

    Args:
        settings: hold the keys.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._key = _digest(settings.api_key)
        self._admin = _digest(settings.admin_api_key)

    def refusal(self, method: str, path: str, header: str | None) -> Failure | None:
        """Why a request may not come in; None if it may.

        Args:
            method: of the request.
            path: of the route.
            header: `Authorization`.
        """
        if method == "OPTIONS" or path == "/" or path.startswith(_OPEN):
            return None
        wanted = self._admin or self._key if path in _ADMIN else self._key
        if wanted is None:
            return None
        scheme, _, given = (header or "").partition(" ")
        if scheme.lower() == "bearer":
            digest = _digest(_text(given.strip())) or b""
            if hmac.compare_digest(digest, wanted):
                return None
            # The admin key opens every door; compared always, so that time tells nothing.
            if hmac.compare_digest(digest, self._admin or b""):
                return None
        return Failure(401, "Unauthorized: send the key as 'Authorization: Bearer KEY'")


def _text(header: str) -> str:
    """What a header's value, which came as Latin-1, says in UTF-8."""
    return header.encode("latin-1", "replace").decode(errors="surrogateescape")


def _digest(key: str | None) -> bytes | None:
    """Equal lengths for all keys, so that comparing them takes equal time."""
    return None if key is None else hashlib.sha256(key.encode(errors="surrogateescape")).digest()
