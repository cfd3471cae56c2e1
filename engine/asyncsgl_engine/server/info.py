"""What the server is and how it is doing."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..request import Request as EngineRequest
from ..request import Sampling
from .events import unless_left
from .failures import Failure, failure_response, json_response
from .metrics import CONTENT_TYPE
from .routing import Shared, served_by
from .service import Service

__all__ = ["router"]

router = APIRouter(tags=["information"])


@router.get("/get_model_info", deprecated=True)
@router.get("/model_info")
async def model_info(service: Shared) -> Response:
    """The model, and what a client needs to render messages for it."""
    tokenizer, config = service.engine.tokenizer, service.engine.config
    return json_response(
        {
            "model_path": service.model_path,
            "served_model_name": service.model_name,
            "tokenizer_path": service.engine.asked.tokenizer_path or service.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "load_format": "auto",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": service.engine.reads_images,
            "has_audio_understanding": False,
            "model_type": config.model.model_type or None,
            "architectures": [config.model.architecture],
            "max_model_len": config.sequence_limit,
            "chat_template": tokenizer.chat_template,
            "special_tokens": dict(tokenizer.special_tokens),
            "cuts_stop_regex": True,
        }
    )


@router.get("/get_server_info", deprecated=True)
@router.get("/server_info")
async def server_info(service: Shared) -> Response:
    """Settings as decided, and counters."""
    config = service.engine.config
    settings: dict[str, Any] = {
        name: value for name, value in asdict(config).items() if name != "model"
    }
    return json_response(
        {
            **settings,
            "served_model_name": service.model_name,
            "tokenizer_path": service.engine.asked.tokenizer_path or service.model_path,
            "dp_size": 1,
            "incremental_streaming_output": service.settings.incremental_streaming_output,
            "max_total_num_tokens": config.max_total_tokens,
            "max_req_input_len": config.sequence_limit - 1,
            "status": "draining" if service.draining else "ready",
            "startup_time": service.started_at,
            "version": service.version,
            "frontend": "python",
            "internal_states": [_internal_state(service)],
        }
    )


def _internal_state(service: Service) -> dict[str, Any]:
    now, config = service.engine.statistics(), service.engine.config
    return {
        **asdict(now),
        "cache_hit_rate": now.cache_hit_rate,
        "last_gen_throughput": service.throughput(),
        "effective_max_running_requests_per_dp": config.max_running_requests,
        "memory_usage": {"kvcache": config.kv_bytes / 2**30},
    }


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the server is there, its model loaded, its engine well, not on its way out; instant."""
    service = served_by(request)
    ill = service.draining or service.starting or service.engine.fault is not None
    return Response(status_code=503 if ill else 200)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether requests can be answered now; instant."""
    return Response(status_code=200 if served_by(request).ready else 503)


@router.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """Whether a token can be generated."""
    service = served_by(request)
    if not service.ready:
        return Response(status_code=503)
    ask = EngineRequest(
        f"health-{uuid.uuid4().hex}",
        (min(service.engine.tokenizer.eos_token_ids, default=0),),
        Sampling(max_new_tokens=1, temperature=0.0),
        no_cache=True,
    )
    try:
        work = service.complete([ask], service.deadline(20.0))
        await unless_left(request.receive, work)
    except (TimeoutError, Failure):
        return Response(status_code=503)
    return Response(status_code=200)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(served_by(request).metrics.text(), media_type=CONTENT_TYPE)


@router.put("/encode", include_in_schema=False)
@router.post("/encode")
async def encode() -> Response:
    """Refused: embeddings need an embedding model."""
    message = "this server runs a model that generates text; it has no embeddings to give"
    return failure_response(Failure(400, message))
