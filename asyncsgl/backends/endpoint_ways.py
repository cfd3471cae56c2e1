"""What an SGLang server does otherwise than programs expect, found out when it matters."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from ..errors import BadRequestError, NotFoundError

__all__ = ["ServerWays"]

Call = Callable[[str, str, bytes | None], Awaitable[bytes]]
"""Sends method, path and body, and gives the body of an answer of status 200."""


class ServerWays:
    """Asks a server about its ways; what it said is remembered.

    Args:
        backend: the backend's name, for errors.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._begins: bool | None = None
        self._seeds: bool | None = None

    async def needs_text(self, call: Call) -> None:
        """Refuse an empty prompt where the server's tokenizer puts no token before it.

        SGLang's scheduler ends, and the whole server with it, at a prompt without a token.

        Raises:
            BadRequestError: a prompt needs text.
        """
        if self._begins is None:
            self._begins = await self._begins_texts(call)
        if not self._begins:
            raise BadRequestError(
                "the prompt is empty, and the model has no token to begin with: "
                "put text before what is generated",
                backend=self._backend,
            )

    async def ignores_seeds(self, call: Call) -> bool:
        """Whether seeds change nothing; SGLang draws by them only if it is started so."""
        if self._seeds is None:
            said = await _asked(call, "GET", "/server_info")
            self._seeds = said.get("enable_deterministic_inference") is not False
        return not self._seeds

    async def _begins_texts(self, call: Call) -> bool:
        said = await _asked(call, "POST", "/v1/tokenize", b'{"prompt": ""}')
        return said.get("count") != 0


async def _asked(
    call: Call, method: str, path: str, body: bytes | None = None
) -> dict[str, object]:
    """The object of an answer; an empty one of a server that does not know the path."""
    try:
        said = json.loads(await call(method, path, body))
    except (NotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
