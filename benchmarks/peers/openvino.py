"""OpenVINO GenAI's continuous batching on the CPU, its cache in the same type as the weights."""

from __future__ import annotations

import importlib
import time
from itertools import count
from typing import Any

from benchmarks.peers.worker import Options, Run, serve
from benchmarks.peers.workloads import Ask, Workload

_SHORT = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINO:
    def __init__(self, options: Options) -> None:
        self._numpy: Any = importlib.import_module("numpy")
        self._openvino: Any = importlib.import_module("openvino")
        self._genai: Any = importlib.import_module("openvino_genai")
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = 4
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_PRECISION_HINT": _SHORT[options.dtype],
            "KV_CACHE_PRECISION": _SHORT[options.dtype],
            "INFERENCE_NUM_THREADS": options.threads,
        }
        pipeline = self._genai.ContinuousBatchingPipeline
        self._pipeline = pipeline(options.model, scheduler, "CPU", properties)
        self._numbers = count()

    @property
    def version(self) -> str:
        return str(self._openvino.__version__).partition("-")[0]

    def run(self, workload: Workload, profile: bool) -> Run:
        del profile
        outputs: list[list[int]] = []
        begun = time.perf_counter()
        for stage in workload.stages:
            handles = [self._hand_over(ask) for ask in stage]
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            outputs = [list(handle.read_all()[0].generated_ids) for handle in handles]
        return Run(time.perf_counter() - begun, outputs)

    def _hand_over(self, ask: Ask) -> Any:
        wanted = self._genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = ask.output
        wanted.ignore_eos = True
        wanted.do_sample = False
        ids = self._numpy.array([ask.prompt], dtype=self._numpy.int64)
        return self._pipeline.add_request(next(self._numbers), self._openvino.Tensor(ids), wanted)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(OpenVINO)
