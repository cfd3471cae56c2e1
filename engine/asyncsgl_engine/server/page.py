"""The page at `/` that shows the engine at work, and what it shows."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from .failures import json_response
from .routing import Shared

__all__ = ["router"]

router = APIRouter(tags=["page"])

_HTML = files("asyncsgl_engine.server").joinpath("page.html").read_bytes()
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page; it holds no data and asks for the key where one is needed."""
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return Response(_HTML, media_type="text/html; charset=utf-8", headers=headers)


@router.get("/v1/history")
async def history(service: Shared) -> Response:
    """The last minutes, second by second, and the last errors."""
    now, config = service.engine.statistics(), service.engine.config
    return json_response(
        {
            "model": service.model_name,
            "version": service.version,
            "max_running_requests": config.max_running_requests,
            "pages_total": now.pages_total,
            "page_size": config.page_size,
            "started_at": service.started_at,
            "state": "draining" if service.draining else "ready",
            "finished": now.finished,
            "aborted": now.aborted,
            "failed": now.failed,
            "moments": [asdict(moment) for moment in service.history.moments],
            "errors": [asdict(incident) for incident in reversed(service.incidents)],
        }
    )
