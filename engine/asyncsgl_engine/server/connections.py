"""HTTP connections that keep nothing of a request that is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Base
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as _Base

__all__ = ["Connection"]


class Connection(_Base):
    """Uvicorn's connection, without the body that nobody read.

    Uvicorn holds what came of a body, up to 300 KiB, until the connection's next request. Where
    requests are refused unread, that is much memory for as many connections as stay open.
    """

    def on_response_complete(self) -> None:
        """Go on to the next request; called by uvicorn at the end of a response."""
        if self.cycle.response_complete:  # else it is the next request's already
            self.cycle.body = bytearray()
        super().on_response_complete()
