"""A web service that answers with a program, and serves the model it uses too.

Run it with ``uvicorn fastapi_app:app`` from this folder.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.responses import StreamingResponse

import asyncsgl as sgl

Length = Annotated[int, Query(ge=1, le=2048, description="tokens at most")]


@sgl.function
async def tell(s: sgl.ProgramState, topic: str, length: int) -> None:
    """Tell something about a topic."""
    s += sgl.user(f"Write a short paragraph about {topic}.")
    s += sgl.assistant(sgl.gen("text", max_tokens=length))


def make_app(backend: sgl.Backend | None = None) -> FastAPI:
    """The service.

    Args:
        backend: answers; by default the default model, loaded when the service starts.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with backend or sgl.Runtime() as model:
            app.state.model = model
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/tell")
    async def whole(request: Request, topic: str, length: Length = 64) -> dict[str, str]:
        """The text, when it is done. A client that leaves does not stop it."""
        model: sgl.Backend = request.app.state.model
        state: sgl.State = await tell.run(topic=topic, length=length, backend=model)
        return {"text": state["text"]}

    @app.get("/stream")
    async def pieces(request: Request, topic: str, length: Length = 64) -> StreamingResponse:
        """The text as it grows. A client that leaves ends the run, and its pages are free."""
        model: sgl.Backend = request.app.state.model

        async def text() -> AsyncIterator[str]:
            async with tell.stream(topic=topic, length=length, backend=model) as run:
                async for piece in run.text("text"):
                    yield piece

        return StreamingResponse(text(), media_type="text/plain")

    return app


app = make_app()
