"""Transformers' `generate` on left-padded batches, a stage at a time.

A batch runs until its longest answer is done; what shorter ones make past their own length is
work that does not count. A prefix that all prompts of a stage share is computed once and its
cache repeated, as a careful user would do by hand.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from benchmarks.peers.worker import Options, Run, serve
from benchmarks.peers.workloads import Ask, Workload

_WORTH_SHARING = 16


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two prompts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((index for index, (one, other) in pairs if one != other), shorter)


class TransformersBatch:
    def __init__(self, options: Options) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._library: Any = importlib.import_module("transformers")
        self._torch.set_num_threads(options.threads)
        dtype = getattr(self._torch, options.dtype)
        load = self._library.AutoModelForCausalLM.from_pretrained
        self._model = load(options.model, dtype=dtype, attn_implementation="sdpa").eval()
        self._model.generation_config.eos_token_id = None  # lengths are exact
        self._model.generation_config.pad_token_id = 0

    @property
    def version(self) -> str:
        return str(self._library.__version__)

    def run(self, workload: Workload, profile: bool) -> Run:
        del profile  # nothing outlives a call, so there is nothing to prime
        begun = time.perf_counter()
        with self._torch.inference_mode():
            outputs = self._stage(workload.asks)
        return Run(time.perf_counter() - begun, outputs)

    def _stage(self, stage: tuple[Ask, ...]) -> list[list[int]]:
        torch = self._torch
        longest = max(len(ask.prompt) for ask in stage)
        ids = torch.zeros(len(stage), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, ask in enumerate(stage):
            ids[row, longest - len(ask.prompt) :] = torch.tensor(ask.prompt)
            mask[row, longest - len(ask.prompt) :] = 1
        made = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(ask.output for ask in stage),
            do_sample=False,
            past_key_values=self._prefix(stage),
        )
        return [
            row[longest : longest + ask.output].tolist()
            for row, ask in zip(made, stage, strict=True)
        ]

    def _prefix(self, stage: tuple[Ask, ...]) -> Any:
        """The cache of the prefix that the prompts share, repeated; None if it is short."""
        first = stage[0].prompt
        common = min((_common(first, ask.prompt) for ask in stage[1:]), default=0)
        if common < _WORTH_SHARING:
            return None
        cache = self._library.DynamicCache(config=self._model.config)
        ids = self._torch.tensor([first[:common]])
        self._model(ids, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(stage))
        return cache

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(TransformersBatch)
