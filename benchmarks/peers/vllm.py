"""vLLM in this process: prefix caching on, token ids in and out, nothing decoded."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from benchmarks.peers.worker import Options, Run, serve
from benchmarks.peers.workloads import Ask, Workload


def imported(threads: int, cache_gib: int) -> Any:
    """The package vllm, in this process and without its telemetry."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)  # read when it is imported
    return importlib.import_module("vllm")


class VLLM:
    def __init__(self, options: Options) -> None:
        self._vllm: Any = imported(options.threads, cache_gib=4)
        self._engine = self._vllm.LLM(
            model=options.model,
            dtype=options.dtype,
            enable_prefix_caching=True,
            max_num_seqs=64,
            max_model_len=8192,
            seed=0,
        )

    @property
    def version(self) -> str:
        return str(self._vllm.__version__)

    def run(self, workload: Workload, profile: bool) -> Run:
        del profile
        outputs: list[list[int]] = []
        begun = time.perf_counter()
        for stage in workload.stages:
            outputs = self._stage(stage)
        return Run(time.perf_counter() - begun, outputs)

    def _stage(self, stage: tuple[Ask, ...]) -> list[list[int]]:
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(ask.prompt)) for ask in stage]
        sampling = [
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=ask.output, ignore_eos=True, detokenize=False
            )
            for ask in stage
        ]
        done = self._engine.generate(prompts, sampling, use_tqdm=False)
        return [list(item.outputs[0].token_ids) for item in done]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(VLLM)
