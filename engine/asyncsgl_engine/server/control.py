"""Routes that act on the server as a whole."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from ..config import ProfileOptions
from .failures import Failure, json_response
from .native_body import AbortBody, ProfileBody
from .routing import Shared

__all__ = ["router"]

router = APIRouter(tags=["control"], strict_content_type=False)


@router.post("/abort_request")
async def abort_request(body: AbortBody, service: Shared) -> Response:
    """End a request by its exact id; unknown ids are ignored, for it may have ended just now."""
    service.abort(body.rid, prefix=body.prefix, everything=body.abort_all)
    return Response(status_code=200)


@router.get("/flush_cache", include_in_schema=False)
@router.post("/flush_cache")
async def flush_cache(
    service: Shared, wait_s: Annotated[float, Query(alias="timeout", ge=0, le=3600)] = 0.0
) -> Response:
    """Empty the prefix cache, if no request runs or all end within `timeout` seconds."""
    if await service.flush_cache(wait_s):
        return Response("Cache flushed.\n", media_type="text/plain")
    message = "Flush cache failed. Requests are running or waiting.\n"
    return Response(message, status_code=400, media_type="text/plain")


@router.get("/start_profile", include_in_schema=False)
@router.post("/start_profile")
async def start_profile(service: Shared, body: ProfileBody | None = None) -> Response:
    """Record what the engine computes, until `/stop_profile`."""
    asked = body or ProfileBody()
    for name, value in (asked.model_extra or {}).items():
        if value:
            raise Failure(400, f"{name} is not supported by this server; leave it out", name)
    options = ProfileOptions(bool(asked.with_stack), bool(asked.record_shapes))
    await service.engine.start_profile(options)
    return Response("Start profiling.\n", media_type="text/plain")


@router.get("/stop_profile", include_in_schema=False)
@router.post("/stop_profile")
async def stop_profile(service: Shared) -> Response:
    """End the recording; the answer tells where the trace is."""
    folder = service.settings.profile_folder or Path(tempfile.gettempdir(), "asyncsgl-profiles")
    path = folder / f"trace-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}.json.gz"
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    await service.engine.stop_profile(path)
    return json_response({"message": "Stop profiling.", "path": str(path)})
