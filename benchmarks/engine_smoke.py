"""The engine beside transformers' batched `generate`: 32 requests of 64 + 64 tokens.

    python benchmarks/engine_smoke.py [--model NAME_OR_FOLDER] [--runs 3] [--dtype float32 ...]

Both run in this process, one after the other, on the same weights, greedy, with the end of
sequence ignored, so each makes exactly 32 x 64 tokens. The best of the runs is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.hub import resolve_model
from asyncsgl_engine.request import Completion, Request, Sampling

REQUESTS, PROMPT, OUTPUT = 32, 64, 64


def prompts(run: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Random token ids, other ones in each run, so that no prefix cache is warm."""
    draw = random.Random(run)
    return [tuple(draw.randrange(1000, vocab_size) for _ in range(PROMPT)) for _ in range(REQUESTS)]


async def ours(model: str, dtype: str, runs: int) -> tuple[float, list[tuple[int, ...]]]:
    """Best seconds of the runs, and the last run's tokens."""
    sampling = Sampling(max_new_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    best, done = float("inf"), list[Completion]()
    async with AsyncEngine(EngineConfig(model_path=model, dtype=dtype)) as engine:
        for run in range(runs + 1):
            requests = [
                Request(f"{run}-{index}", ids, sampling)
                for index, ids in enumerate(prompts(run, engine.config.model.vocab_size))
            ]
            begun = time.perf_counter()
            done = await asyncio.gather(*(engine.generate(request) for request in requests))
            if run:
                best = min(best, time.perf_counter() - begun)
    return best, [answer.token_ids for answer in done]


def theirs(model: str, dtype: str, runs: int) -> tuple[float, list[tuple[int, ...]]]:
    """The same with transformers' `generate` on one padded-free batch."""
    path = resolve_model(model).path
    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    best, out = float("inf"), torch.empty(0, PROMPT)
    for run in range(runs + 1):
        ids = torch.tensor(prompts(run, module.config.vocab_size))
        begun = time.perf_counter()
        with torch.inference_mode():
            out = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=OUTPUT,
                min_new_tokens=OUTPUT,
                do_sample=False,
                pad_token_id=0,
            )
        if run:
            best = min(best, time.perf_counter() - begun)
    return best, [tuple(row) for row in out[:, PROMPT:].tolist()]


def main() -> None:
    """Print both rates and their ratio for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    asked = parser.parse_args()
    for dtype in asked.dtype:
        mine, mine_tokens = asyncio.run(ours(asked.model, dtype, asked.runs))
        other, other_tokens = theirs(asked.model, dtype, asked.runs)
        same = sum(a == b for a, b in zip(mine_tokens, other_tokens, strict=True))
        total = REQUESTS * OUTPUT
        print(
            f"{dtype:9} engine {total / mine:7.1f} tokens/s   transformers {total / other:7.1f} "
            f"tokens/s   ratio {other / mine:5.2f}   same output {same}/{REQUESTS}",
            flush=True,
        )


if __name__ == "__main__":
    main()
