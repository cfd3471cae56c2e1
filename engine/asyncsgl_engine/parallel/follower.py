"""What a rank other than 0 does: load, then compute plan after plan."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import torch

from ..config import ModelFacts, ResolvedConfig
from ..device import inspect_device
from ..hub.cache import default_cache_root
from ..loading import choose_attention
from ..native import build_library
from ..runner import ModelRunner
from .group import Group
from .ranks import Setup
from .weights import draw
from .wire import Kind, PlanReader, receive, send, send_json

__all__ = ["follow"]


def follow(sock: socket.socket) -> None:
    """Do as rank 0 says until it closes the socket.

    Raises:
        Exception: whatever goes wrong; the ranks are out of step then.
    """
    send(sock, Kind.HELLO)
    given = _expect(sock, Kind.SETUP)
    if given is None:
        return
    rank = int(given.pop("rank"))
    setup = Setup(**given)
    device = _take_device(setup, rank)
    group = Group.connect(Path(setup.meeting), rank, setup.size, device, setup.limit_s)
    blueprint = draw(Path(setup.path), getattr(torch, setup.dtype), setup.size)
    model = blueprint.build(group, device)
    send_json(sock, Kind.READY, {"free_bytes": inspect_device(setup.device).free_bytes})
    settings = _expect(sock, Kind.CONFIG)
    if settings is None:
        return
    config = ResolvedConfig(**{**settings, "model": ModelFacts(**settings["model"])})
    library = build_library(default_cache_root() / "native") if config.native else None
    runner = ModelRunner(model, config, choose_attention(config, model.facts, library), library)
    send_json(sock, Kind.READY, {})
    reader = PlanReader()
    while (frame := receive(sock)) is not None:
        runner.compute(reader.read(frame[1]))


def _expect(sock: socket.socket, kind: Kind) -> dict[str, Any] | None:
    frame = receive(sock)
    if frame is None:
        return None
    assert frame[0] is kind, f"expected {kind.name}, heard {frame[0].name}"
    body: dict[str, Any] = json.loads(frame[1])
    return body


def _take_device(setup: Setup, rank: int) -> torch.device:
    torch.set_num_threads(setup.threads)
    if setup.device == "cuda":
        torch.cuda.set_device(rank)
    return torch.device(setup.device)
