"""OpenAI's routes for files and batches."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse, Response

from .batch_runner import ENDPOINTS, BatchRunner, new_batch
from .batch_store import BatchStore, Kind
from .failures import Failure, json_response
from .routing import Shared
from .service import Service

__all__ = ["router"]

router = APIRouter(tags=["batches"])

Limit = Annotated[int, Query(ge=1, le=10000)]


class BatchBody(BaseModel):
    """What to run."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(default=None, max_length=16)


def _places(service: Service) -> tuple[BatchStore, BatchRunner]:
    if service.batches is None:
        raise Failure(501, f"files and batches are not available: {service.why_no_batches}")
    return service.batches


async def _thing(store: BatchStore, kind: Kind, name: str) -> dict[str, Any]:
    found = await asyncio.to_thread(store.get, kind, name)
    if found is None:
        raise Failure(404, f"there is no {kind.removesuffix('s')} {name!r}", "id")
    return found


def _page(things: list[dict[str, Any]], after: str | None, limit: int) -> Response:
    if after is not None:
        names = [thing["id"] for thing in things]
        things = things[names.index(after) + 1 :] if after in names else []
    page = things[:limit]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(things) > limit,
        }
    )


@router.post("/v1/files")
async def add_file(
    service: Shared, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]
) -> Response:
    """Keep a file of requests, a JSON object a line."""
    store, _ = _places(service)
    if purpose != "batch":
        raise Failure(400, f"purpose: must be 'batch', not {purpose!r}", "purpose")
    name = file.filename or "requests.jsonl"
    return json_response(await asyncio.to_thread(store.add_file, file.file, name, purpose))


@router.get("/v1/files")
async def files(
    service: Shared, purpose: str | None = None, after: str | None = None, limit: Limit = 10000
) -> Response:
    """All files, newest first."""
    store, _ = _places(service)
    things = await asyncio.to_thread(store.all, "files")
    wanted = [thing for thing in things if purpose in (None, thing["purpose"])]
    return _page(wanted, after, limit)


@router.get("/v1/files/{name}")
async def file(name: str, service: Shared) -> Response:
    """A file, by its id."""
    store, _ = _places(service)
    return json_response(await _thing(store, "files", name))


@router.get("/v1/files/{name}/content")
async def content(name: str, service: Shared) -> Response:
    """A file's bytes."""
    store, _ = _places(service)
    await _thing(store, "files", name)
    return FileResponse(store.content(name), media_type="application/octet-stream")


@router.delete("/v1/files/{name}")
async def remove_file(name: str, service: Shared) -> Response:
    """Forget a file."""
    store, _ = _places(service)
    await _thing(store, "files", name)
    await asyncio.to_thread(store.remove_file, name)
    return json_response({"id": name, "object": "file", "deleted": True})


@router.post("/v1/batches")
async def add_batch(body: BatchBody, service: Shared) -> Response:
    """Run the requests of a file."""
    store, runner = _places(service)
    if body.endpoint not in ENDPOINTS:
        message = f"endpoint: must be one of {', '.join(ENDPOINTS)}, not {body.endpoint!r}"
        raise Failure(400, message, "endpoint")
    await _thing(store, "files", body.input_file_id)
    batch = new_batch(body.endpoint, body.input_file_id, body.metadata)
    await runner.add(batch)
    return json_response(batch)


@router.get("/v1/batches")
async def batches(service: Shared, after: str | None = None, limit: Limit = 20) -> Response:
    """All batches, newest first."""
    store, runner = _places(service)
    things = await asyncio.to_thread(store.all, "batches")
    return _page([await runner.get(thing["id"]) or thing for thing in things], after, limit)


@router.get("/v1/batches/{name}")
async def batch(name: str, service: Shared) -> Response:
    """A batch, by its id."""
    return json_response(await _batch(service, name))


@router.post("/v1/batches/{name}/cancel")
async def cancel_batch(name: str, service: Shared) -> Response:
    """Stop a batch; what is answered is kept."""
    _, runner = _places(service)
    found = await _batch(service, name)
    await runner.cancel(found)
    return json_response(found)


async def _batch(service: Service, name: str) -> dict[str, Any]:
    _, runner = _places(service)
    found = await runner.get(name)
    if found is None:
        raise Failure(404, f"there is no batch {name!r}", "id")
    return found
