"""Rank 0's way from a configuration to its part of the model, with the others under way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ..config import DeviceFacts, EngineConfig, ModelFacts
from ..device import inspect_device
from ..errors import ConfigError
from ..model import LoadedModel
from .group import check_available
from .ranks import Ranks, Setup
from .weights import draw

__all__ = ["Start"]


class Start:
    """Sees that a model can be shared out, before anything of it is loaded.

    Args:
        config: as asked for; its `tp_size` is above 1.
        path: the model's folder.
        device: of this process.

    Raises:
        ConfigError: the model, or this machine, cannot be shared so.
        ModelError: the folder has no model that the engine can run.
    """

    def __init__(self, config: EngineConfig, path: Path, device: DeviceFacts) -> None:
        self._config = config
        self._facts = device
        self._device = torch.device(device.device)
        self._dtype = config.resolve_dtype(device)
        self._path = path
        _check_machine(config.tp_size, self._device)
        self._blueprint = draw(path, getattr(torch, self._dtype), config.tp_size)

    @property
    def facts(self) -> ModelFacts:
        """Of the whole model."""
        return self._blueprint.facts

    @contextmanager
    def ranks(self) -> Iterator[Ranks]:
        """Start the other ranks; a failure of the block ends them."""
        threads = self._config.threads_of_rank(self._facts)
        ranks = Ranks(self._config.tp_size, threads, self._config.watchdog_timeout)
        try:
            yield ranks
        except BaseException:
            ranks.close()
            raise

    def load(self, ranks: Ranks) -> LoadedModel:
        """This rank's part of the model, while the others load theirs; once.

        Raises:
            ModelError: the weights cannot be read.
            RankFailed: another rank could not start.
        """
        config = self._config
        setup = Setup(
            path=str(self._path),
            dtype=self._dtype,
            device=self._device.type,
            size=config.tp_size,
            threads=config.threads_of_rank(self._facts),
            limit_s=config.watchdog_timeout,
            meeting=str(ranks.meeting),
        )
        return self._blueprint.build(ranks.connect(setup, self._device), self._device)

    def room(self, ranks: Ranks) -> DeviceFacts:
        """The device, with the least memory that a rank has left once all have loaded.

        Raises:
            RankFailed: a rank could not load its part.
        """
        least = ranks.loaded()
        mine = inspect_device(self._config.device)
        return replace(mine, threads=self._facts.threads, free_bytes=min(mine.free_bytes, least))


def _check_machine(size: int, device: torch.device) -> None:
    if os.name != "posix":
        raise ConfigError("tp_size: the ranks talk over sockets that only POSIX systems have")
    if device.type == "cuda" and (count := torch.cuda.device_count()) < size:
        raise ConfigError(
            f"tp_size: {size} ranks need {size} CUDA devices, and PyTorch sees {count} here"
        )
    check_available(device)
