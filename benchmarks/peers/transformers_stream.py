"""Transformers' continuous batching, its prefix sharing on and its sizes its own choice."""

from __future__ import annotations

import importlib
import time
from typing import Any

from benchmarks.peers.worker import Options, Run, serve
from benchmarks.peers.workloads import Ask, Workload


class TransformersStream:
    def __init__(self, options: Options) -> None:
        torch: Any = importlib.import_module("torch")
        self._library: Any = importlib.import_module("transformers")
        torch.set_num_threads(options.threads)
        load = self._library.AutoModelForCausalLM.from_pretrained
        self._model = load(
            options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        ).eval()
        self._name = ""
        self._manager: Any = None

    @property
    def version(self) -> str:
        return str(self._library.__version__)

    def run(self, workload: Workload, profile: bool) -> Run:
        del profile
        if workload.name != self._name:
            self.close()
            self._manager = self._start(workload)
            self._name = workload.name
        outputs: list[list[int]] = []
        begun = time.perf_counter()
        for stage in workload.stages:
            outputs = self._stage(stage)
        return Run(time.perf_counter() - begun, outputs)

    def _start(self, workload: Workload) -> Any:
        """A manager sized for the workload, as its users are told to do."""
        utils = importlib.import_module("transformers.generation.continuous_batching.utils")
        manager = self._model.init_continuous_batching(
            generation_config=self._library.GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=16
            ),
            continuous_batching_config=self._library.ContinuousBatchingConfig(
                allow_block_sharing=True
            ),
            workload_hints=utils.WorkloadHints(
                max_prompt_length=max(len(ask.prompt) for ask in workload.asks),
                max_generated_length=max(ask.output for ask in workload.asks),
                num_requests=len(workload.asks),
            ),
        )
        manager.warmup()
        manager.start()
        return manager

    def _stage(self, stage: tuple[Ask, ...]) -> list[list[int]]:
        names = [
            self._manager.add_request(list(ask.prompt), max_new_tokens=ask.output, eos_token_id=-1)
            for ask in stage
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the manager's thread ended")
                continue
            if result.error:
                raise RuntimeError(result.error)
            if result.is_finished():
                done[result.request_id] = list(result.generated_tokens)
        return [done[name] for name in names]

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=30)
            self._manager.destroy()


if __name__ == "__main__":
    serve(TransformersStream)
