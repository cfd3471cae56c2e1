"""What this machine offers."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import DeviceFacts
from .errors import ConfigError

__all__ = ["inspect_device"]


def inspect_device(asked: str) -> DeviceFacts:
    """Look at the machine.

    Args:
        asked: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: `cuda` was asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise ConfigError("device: cuda was asked for, but PyTorch sees no CUDA device here")
    threads = torch.get_num_threads()
    if has_cuda and asked != "cpu":
        free, _ = torch.cuda.mem_get_info()
        return DeviceFacts(
            "cuda", free, torch.cuda.is_bf16_supported(including_emulation=False), threads
        )
    return DeviceFacts("cpu", _free_memory(), _multiplies_bfloat16(), threads)


def _multiplies_bfloat16() -> bool:
    # The capability queries are underscored in PyTorch, so their absence means "no".
    queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in queries)


def _free_memory() -> int:
    """Bytes this process may still take: what the system or its control group has left."""
    system = _first_number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    limit = _first_number(Path("/sys/fs/cgroup/memory.max"), "")
    used = _first_number(Path("/sys/fs/cgroup/memory.current"), "")
    left = [value for value in (system, limit - used if limit else 0) if value > 0]
    return min(left, default=4 << 30)


def _first_number(path: Path, label: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        word = line.removeprefix(label).split()
        if line.startswith(label) and word and word[0].isdigit():
            return int(word[0])
    return 0
