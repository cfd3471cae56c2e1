"""The ranks' sums and gathers, over a process group that belongs to one engine."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import distributed
from torch.nn.functional import pad

from ..errors import ConfigError

__all__ = ["Group", "check_available", "span"]

_LOOPBACK = "127.0.0.1"
_CONNECT_S = 60.0


def span(total: int, parts: int, index: int) -> tuple[int, int]:
    """Where part `index` of `parts` begins and ends; the first ones take what is left over."""
    size, rest = divmod(total, parts)
    begin = index * size + min(index, rest)
    return begin, begin + size + (index < rest)


class _Pending(Protocol):
    def wait(self) -> bool: ...


class _Backend(Protocol):
    """What PyTorch's process groups have in common."""

    def allreduce(self, tensors: list[torch.Tensor], /) -> _Pending: ...

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], /
    ) -> _Pending: ...

    def gather(
        self,
        outputs: list[list[torch.Tensor]],
        inputs: list[torch.Tensor],
        options: distributed.GatherOptions,
        /,
    ) -> _Pending: ...

    def abort(self) -> None: ...


class Group:
    """The ranks that hold the shards of one model; each calls the same methods in the same order.

    It is not PyTorch's default group, which a process has only one of and which is the user's.

    Args:
        backend: connects the ranks.
        rank: this process's.
        size: how many there are.
    """

    def __init__(self, backend: _Backend, rank: int, size: int) -> None:
        self._backend = backend
        self.rank, self.size = rank, size

    @classmethod
    def connect(
        cls, meeting: Path, rank: int, size: int, device: torch.device, limit_s: float
    ) -> Self:
        """Meet the other ranks; returns when all are there.

        Args:
            meeting: a file that does not exist yet, the same for all, in a folder that nobody
                else may read.
            rank: this process's, below `size`.
            size: of the group.
            device: where the tensors are: Gloo connects processors, NCCL connects CUDA devices.
            limit_s: seconds that a rank may keep the others waiting.

        Raises:
            ConfigError: PyTorch was built without what it takes.
            RuntimeError: the others did not come.
        """
        check_available(device)
        store: Any = distributed.FileStore(str(meeting), size)  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=_CONNECT_S))
        limit = timedelta(seconds=limit_s)
        connect = _nccl if device.type == "cuda" else _gloo
        return cls(connect(store, rank, size, limit), rank, size)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Put the sum of all ranks' tensors in the place of each."""
        self._backend.allreduce([tensor]).wait()

    def gather_columns(
        self, part: torch.Tensor, total: int, root_only: bool = False
    ) -> torch.Tensor:
        """Join what the ranks have of a tensor's last dimension.

        Args:
            part: (..., end - begin) of this rank's `span`.
            total: elements of the whole.
            root_only: give the whole to rank 0, and to the others their own part back.

        Returns:
            (..., total).
        """
        sizes = [end - begin for begin, end in (self.span(total, r) for r in range(self.size))]
        padded = pad(part, (0, sizes[0] - part.shape[-1])).contiguous()  # all of one length
        wanted = self.rank == 0 or not root_only
        parts = [torch.empty_like(padded) for _ in sizes] if wanted else []
        if root_only:
            options = distributed.GatherOptions()
            options.rootRank = 0
            self._backend.gather([parts] if wanted else [], [padded], options).wait()
        else:
            self._backend.allgather([parts], [padded]).wait()
        if not wanted:
            return part
        return torch.cat([whole[..., :size] for whole, size in zip(parts, sizes, strict=True)], -1)

    def span(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """Where the part of a rank, by default this one, begins and ends."""
        return span(total, self.size, self.rank if rank is None else rank)

    def abort(self) -> None:
        """Fail what waits for another rank; any thread may call this."""
        self._backend.abort()


def check_available(device: torch.device) -> None:
    """See that PyTorch can connect ranks on this kind of device.

    Raises:
        ConfigError: it cannot.
    """
    name = "NCCL" if device.type == "cuda" else "Gloo"
    there = distributed.is_available() and (
        distributed.is_nccl_available() if name == "NCCL" else distributed.is_gloo_available()
    )
    if not there:
        raise ConfigError(f"tp_size: this PyTorch was built without {name}; use tp_size=1")


def _gloo(store: Any, rank: int, size: int, limit: timedelta) -> _Backend:
    kind: Any = distributed.ProcessGroupGloo
    options = kind._Options()  # noqa: SLF001 - as PyTorch's own init_process_group makes them
    # Else it listens at the address of the machine's name.
    options._devices = [kind.create_device(hostname=_LOOPBACK)]  # noqa: SLF001
    options._timeout = limit  # noqa: SLF001
    made: _Backend = kind(store, rank, size, options)
    return made


def _nccl(store: Any, rank: int, size: int, limit: timedelta) -> _Backend:
    # All ranks are on this machine; and PyTorch would end this process, which is the user's, for
    # an error that `Ranks` reports.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    kind: Any = distributed.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = limit  # noqa: SLF001
    made: _Backend = kind(store, rank, size, options)
    return made
