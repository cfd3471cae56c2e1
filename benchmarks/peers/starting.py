"""One start of a contestant in a process of its own: import, load, one token.

    python -m benchmarks.peers.starting NAME --model MODEL --dtype bfloat16 --threads 2

Prints a line of JSON: when each part ended, by the clock that all processes of a machine share,
and the most memory that the process held. It runs in the environment of a peer, so only the
standard library is used. What the contestant itself prints goes to the standard error output.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["STARTS", "Marks"]

PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Marks:
    """When the parts of a start ended, in seconds of `time.monotonic`.

    Args:
        imported: what is imported by name is there.
        loaded: prompts can be given.
        answered: one token of an answer is there.
        peak_mib: most memory the process held.
        answer: what it said.
        version: of the contestant.
    """

    imported: float
    loaded: float
    answered: float
    peak_mib: float
    answer: str
    version: str


@dataclass(frozen=True)
class Options:
    """What a contestant is started with; see `benchmarks.peers.worker`."""

    model: str
    dtype: str
    threads: int


def _ours(options: Options) -> Marks:
    sgl: Any = importlib.import_module("asyncsgl")
    imported = time.monotonic()

    async def one(s: Any) -> None:
        s += PROMPT
        s += sgl.gen("word", max_tokens=1, temperature=0, ignore_eos=True)

    async def run() -> Marks:
        settings = {"dtype": options.dtype, "num_threads": options.threads}
        async with sgl.Runtime(options.model, **settings) as runtime:
            loaded = time.monotonic()
            state = await sgl.function(one).run(backend=runtime)
            answered = time.monotonic()
            return _marks(imported, loaded, answered, state["word"], sgl.__version__)

    return asyncio.run(run())


def _transformers(options: Options) -> Marks:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    auto = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    torch.set_num_threads(options.threads)
    imported = time.monotonic()
    tokenizer = auto[1].from_pretrained(options.model)
    model = auto[0].from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    loaded = time.monotonic()
    given = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=1, do_sample=False)
    answered = time.monotonic()
    answer = tokenizer.decode(made[0, given["input_ids"].shape[1] :])
    return _marks(imported, loaded, answered, answer, transformers.__version__)


def _vllm(options: Options) -> Marks:
    from benchmarks.peers.vllm import imported as vllm_imported

    vllm = vllm_imported(options.threads, cache_gib=1)
    imported = time.monotonic()
    engine = vllm.LLM(model=options.model, dtype=options.dtype, max_model_len=8192, seed=0)
    loaded = time.monotonic()
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    answer = engine.generate([PROMPT], sampling, use_tqdm=False)[0].outputs[0].text
    return _marks(imported, loaded, time.monotonic(), answer, vllm.__version__)


def _openvino(options: Options) -> Marks:
    genai: Any = importlib.import_module("openvino_genai")
    imported = time.monotonic()
    short = {"float32": "f32", "bfloat16": "bf16"}[options.dtype]
    properties = {"INFERENCE_PRECISION_HINT": short, "INFERENCE_NUM_THREADS": options.threads}
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)
    loaded = time.monotonic()
    sampling = genai.GenerationConfig()
    sampling.max_new_tokens = 1
    sampling.apply_chat_template = False
    answer = pipeline.generate([PROMPT], [sampling])[0].m_generation_ids[0]
    return _marks(imported, loaded, time.monotonic(), answer, genai.__version__)


STARTS: dict[str, Callable[[Options], Marks]] = {
    "asyncsgl": _ours,
    "transformers": _transformers,
    "vllm": _vllm,
    "openvino": _openvino,
}


def _marks(imported: float, loaded: float, answered: float, answer: str, version: str) -> Marks:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Marks(imported, loaded, answered, peak, str(answer), str(version))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(STARTS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    marks = STARTS[asked.name](Options(asked.model, asked.dtype, asked.threads))
    out.write(json.dumps(asdict(marks)) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
