"""A contestant in a process of its own: loads once, then runs what it is told, line by line.

One line of JSON in, one out: `{"workload": "A", "repetition": 0}` gives
`{"wall_s": ..., "outputs": [[...], ...]}`. What the contestant itself prints goes to the
standard error output, so that nothing gets between the lines. It runs in the environment of a
peer, so only the standard library is used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol

from benchmarks.peers.workloads import Workload, build

__all__ = ["Contestant", "Options", "Run", "serve"]


@dataclass(frozen=True)
class Options:
    """What every contestant is started with.

    Args:
        model: a folder or file in the form that it takes.
        dtype: `bfloat16` or `float32`.
        threads: cores to compute on.
    """

    model: str
    dtype: str
    threads: int


@dataclass
class Run:
    """What one run of a workload gave.

    Args:
        wall_s: from handing over the first request to the end of the last.
        outputs: the token ids of each request that counts, in order.
        ttft_s: to the first token, where it can be told.
        phases: share of the wall time by what was done, where it was asked for.
    """

    wall_s: float
    outputs: list[list[int]]
    ttft_s: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


class Contestant(Protocol):
    """An engine that is loaded and idle between runs."""

    @property
    def version(self) -> str:
        """Of the library."""
        ...

    def run(self, workload: Workload, profile: bool) -> Run:
        """Run a workload; `profile` asks for the phases, which it may leave empty."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


def serve(make: Callable[[Options], Contestant]) -> None:
    """Answer lines until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = Options(**vars(parser.parse_args()))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        begun = time.perf_counter()
        contestant = make(options)
    except Exception as error:  # noqa: BLE001 - told to whoever started this
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"version": contestant.version, "load_s": time.perf_counter() - begun})
    try:
        for line in sys.stdin:
            answer(_run(contestant, json.loads(line)))
    finally:
        contestant.close()


def _run(contestant: Contestant, command: dict[str, object]) -> dict[str, object]:
    workload = build(str(command["workload"]), int(str(command["repetition"])))
    try:
        return asdict(contestant.run(workload, bool(command.get("profile"))))
    except Exception as error:  # noqa: BLE001 - told to whoever asked
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
