"""Our engine, as programs use it: requests from an event loop, steps on its own thread."""

from __future__ import annotations

import asyncio
import time
from importlib import metadata
from itertools import count

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.request import Completion, Request, Sampling
from benchmarks.peers.phases import ThreadWatch
from benchmarks.peers.worker import Options, Run, serve
from benchmarks.peers.workloads import Ask, Workload


class Ours:
    def __init__(self, options: Options) -> None:
        self._runner = asyncio.Runner()
        config = EngineConfig(
            model_path=options.model, dtype=options.dtype, num_threads=options.threads
        )
        self._engine = AsyncEngine(config)
        self._runner.run(self._engine.start())
        self._numbers = count()

    @property
    def version(self) -> str:
        return metadata.version("asyncsgl")

    def run(self, workload: Workload, profile: bool) -> Run:
        if not profile:
            return self._runner.run(self._run(workload))
        with ThreadWatch("asyncsgl-engine") as watch:
            run = self._runner.run(self._run(workload))
        run.phases = watch.phases()
        return run

    async def _run(self, workload: Workload) -> Run:
        done: list[Completion] = []
        begun = time.perf_counter()
        for stage in workload.stages:
            done = await asyncio.gather(*(self._ask(ask) for ask in stage))
        wall = time.perf_counter() - begun
        first = min(answer.finish.ttft_s for answer in done)
        return Run(wall, [list(answer.token_ids) for answer in done], first)

    async def _ask(self, ask: Ask) -> Completion:
        sampling = Sampling(max_new_tokens=ask.output, temperature=0.0, ignore_eos=True)
        return await self._engine.generate(
            Request(f"bench-{next(self._numbers)}", ask.prompt, sampling)
        )

    def close(self) -> None:
        self._engine.shutdown()
        self._runner.close()


if __name__ == "__main__":
    serve(Ours)
