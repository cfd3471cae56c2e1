"""How busy the server is, for what spreads load over several of them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from .failures import Failure, json_response
from .metrics import CONTENT_TYPE
from .routing import Shared
from .service import Service

__all__ = ["router"]

router = APIRouter(tags=["information"])

_SECTIONS = ("core", "memory", "queues", "all")
_NOT_HERE = ("spec", "lora", "disagg")
"""Sections of SGLang's for what this server does not have."""


@router.get("/v1/loads")
async def loads(
    service: Shared,
    dp_rank: int | None = None,
    include: Annotated[str | None, Query(description="sections, separated by commas")] = None,
    form: Annotated[Literal["json", "prometheus"], Query(alias="format")] = "json",
) -> Response:
    """How busy the server is; one entry, for there is one engine."""
    sections = _sections(include)
    found = [_load(service, sections)] if dp_rank in (None, 0) else []
    if form == "prometheus":
        return Response(_prometheus(found), media_type=CONTENT_TYPE)
    return json_response(
        {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": service.version,
            "accelerator": service.engine.config.device,
            "num_accelerators": 1,
            "loads": found,
        }
    )


def _sections(include: str | None) -> set[str]:
    asked = {part.strip() for part in include.split(",")} if include else {"all"}
    unknown = asked - {*_SECTIONS, *_NOT_HERE}
    if unknown:
        known = ", ".join(_SECTIONS)
        raise Failure(400, f"include: no section {min(unknown)!r}; there are {known}", "include")
    return asked


def _load(service: Service, sections: set[str]) -> dict[str, Any]:
    now, config = service.engine.statistics(), service.engine.config
    used = now.pages_held * config.page_size
    load: dict[str, Any] = {
        "timestamp": time.time(),
        "dp_rank": 0,
        "num_running_reqs": now.running,
        "num_waiting_reqs": now.waiting,
        "num_total_reqs": now.running + now.waiting,
        "num_used_tokens": used,
        "num_active_tokens": used,
        "max_total_num_tokens": config.max_total_tokens,
        "max_running_requests": config.max_running_requests,
        "max_queued_requests": config.max_queued_requests,
        "token_usage": now.pages_held / now.pages_total,
        "gen_throughput": service.throughput(),
        "cache_hit_rate": now.cache_hit_rate,
        "utilization": now.running / config.max_running_requests,
        "total_prefill_uncached_tokens": now.prompt_tokens - now.cached_tokens,
    }
    if sections & {"all", "memory"}:
        load["memory"] = {
            "kv_cache_gb": config.kv_bytes / 2**30,
            "token_capacity": config.max_total_tokens,
        }
    if sections & {"all", "queues"}:
        load["queues"] = {"waiting": now.waiting}
    return load


def _prometheus(found: list[dict[str, Any]]) -> str:
    """The same as gauges, as SGLang's servers write them."""
    lines: list[str] = []
    for load in found:
        for name, value in _flat(load):
            lines.append(f"# TYPE sglang_{name} gauge")
            lines.append(f'sglang_{name}{{dp_rank="{load["dp_rank"]}"}} {value}')
    return "\n".join(lines) + "\n"


def _flat(load: dict[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in load.items():
        if isinstance(value, dict):
            flat += [(f"{name}_{inner}", amount) for inner, amount in value.items()]
        elif name != "dp_rank":
            flat.append((name, value))
    return flat
