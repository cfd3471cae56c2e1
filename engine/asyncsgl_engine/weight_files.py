"""The safetensors files of a model folder, read a bit at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

__all__ = ["WeightFiles", "weight_files"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_WINDOW = 64 << 20


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights; none where they are kept in another way."""
    index = folder / _INDEX
    if index.is_file():
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / Path(name).name for name in sorted(set(places.values()))]
    return [folder / _SINGLE] if (folder / _SINGLE).is_file() else []


class WeightFiles:
    """A model's tensors by name, without all of them in memory at once.

    A file is mapped into memory, and what was read of it counts as this process's memory for as
    long as it is. So it is mapped anew from time to time, and what nobody holds any more is let
    go. Not to be used by several threads at once.

    Args:
        folder: with safetensors files.

    Raises:
        OSError: a file cannot be read.
        SafetensorError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as opened:
                self._places.update(dict.fromkeys(opened.keys(), path))
        self._open: tuple[Path, Any] | None = None
        self._since = 0

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is in its file, which must not be changed while the tensor is in use.

        Raises:
            KeyError: there is none of this name.
            OSError: the file cannot be read.
            SafetensorError: the file is damaged.
        """
        tensor: torch.Tensor = self._mapping(self._places[name]).get_tensor(name)
        self._since += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Let go of the file that is open; tensors that were read stay."""
        self._open = None

    def _mapping(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path or self._since > _WINDOW:
            self._open = None
            self._open = path, safe_open(path, framework="pt")
            self._since = 0
        return self._open[1]
