"""The engine on one GPU beside what the hardware allows, and beside transformers.

    python benchmarks/gpu.py [--json FILE] [--layers 32] [--no-graphs] [--no-peer]

The model has the shape of Llama 3 8B, random bfloat16 weights, and is made in memory. It needs
torch, triton and transformers, no file and no network. `--device cpu --tiny` tries the harness on
a machine without a GPU; its figures mean nothing.

- limits: a large copy (bytes read and written a second) and a large matrix product.
- decode: the median of whole engine steps (plan, forward, sampling, bookkeeping) at batch 1, 16
  and 64, as the share of it that reading the weights and the keys and values would take at the
  bandwidth of the copy.
- prefill: one long prompt, as the share of it that its multiplications would take at the rate of
  the matrix product.
- A, B: 64 requests at once; B's share a prefix of 1,024 tokens. Output tokens a second, greedy,
  beside transformers' continuous batching on the same weights. The first run warms up.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from asyncsgl_engine.answer import Decoder
from asyncsgl_engine.attention import TorchAttention, build_triton
from asyncsgl_engine.config import DeviceFacts, EngineConfig
from asyncsgl_engine.constraints import Constraints
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.model import LoadedModel, wrap_model
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.runner import ModelRunner


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    copy_bytes: int
    product: int  # side of the square matrices
    batches: tuple[int, ...]
    context: int  # prompt tokens of a decoding request
    steps: int
    prompt: int  # tokens of the long prompt
    requests: int
    lengths: tuple[int, int]  # of prompts in A
    outputs: tuple[int, int]  # of answers in A
    prefix: int  # of prompts in B
    own: int
    output: int
    cache_tokens: int
    chunk: int


FULL = Scale(
    4 << 30,
    8192,
    (1, 16, 64),
    1024,
    64,
    8192,
    64,
    (32, 256),
    (32, 128),
    1024,
    32,
    32,
    131_072,
    8192,
)
TINY = Scale(1 << 20, 64, (1, 3), 20, 4, 64, 6, (4, 12), (3, 6), 32, 4, 4, 2048, 64)


@dataclass(frozen=True)
class Figure:
    """One line of the table; `share` is of what the hardware allows, or against the peer."""

    name: str
    value: float
    unit: str
    share: float | None = None


class Silence:
    """Stands for a tokenizer and its decoder: tokens are all that is measured."""

    eos_token_ids: frozenset[int] = frozenset()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        del ids, skip_special_tokens
        return ""

    def stream(self, skip_special_tokens: bool = True) -> Decoder:
        del skip_special_tokens
        return self

    def push(self, ids: Sequence[int]) -> str:
        del ids
        return ""

    def flush(self) -> str:
        return ""


def llama(tiny: bool, layers: int) -> LlamaConfig:
    """The shape of Llama 3 8B, or a very small one."""
    if tiny:
        return LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=16_384,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )


def build(config: LlamaConfig, device: torch.device) -> Any:
    """A model with random weights, on the device."""
    torch.manual_seed(0)
    with device:
        module: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return module.eval()


def seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Median time of one call, the device's work included."""
    taken = []
    for number in range(times + 2):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def copy_rate(scale: Scale, device: torch.device) -> float:
    """Bytes a second of a copy, those read and those written."""
    source = torch.empty(scale.copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * scale.copy_bytes / seconds(lambda: target.copy_(source), device)


def product_rate(scale: Scale, device: torch.device) -> float:
    """Operations a second of a matrix product in bfloat16."""
    side = scale.product
    left, right = torch.randn(2, side, side, device=device).to(torch.bfloat16).unbind(0)
    return 2 * side**3 / seconds(lambda: left @ right, device)


def core_of(model: LoadedModel, scale: Scale, device: torch.device, graphs: bool) -> EngineCore:
    """An engine over a model that is in memory."""
    config = EngineConfig(
        dtype="bfloat16",
        device=device.type,
        max_total_tokens=scale.cache_tokens,
        max_running_requests=max(*scale.batches, scale.requests),
        chunked_prefill_size=scale.chunk,
        disable_cuda_graph=not graphs,
    )
    resolved = config.resolve(model.facts, DeviceFacts(device.type, 1 << 40, True, 1))
    attention = None
    if device.type == "cuda":
        attention = build_triton(torch.bfloat16, model.facts)
    runner = ModelRunner(model, resolved, attention or TorchAttention())

    def no_grammars() -> Any:
        raise RuntimeError("no request here has a grammar")

    return EngineCore(resolved, runner, Silence(), Constraints(no_grammars))


def requests(prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[Request]:
    """Greedy requests that make exactly so many tokens."""
    return [
        Request(f"r{number}", tuple(prompt), Sampling(output, temperature=0.0, ignore_eos=True))
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def drive(core: EngineCore, asked: Sequence[Request]) -> tuple[float, int, list[float]]:
    """Run requests that come at once: seconds, tokens, and seconds of each step."""
    begun = time.perf_counter()
    made, steps, waiting = 0, [], list(asked)
    while waiting or core.busy:
        at = time.perf_counter()
        deltas = core.step(waiting)
        steps.append(time.perf_counter() - at)
        waiting = []
        for delta in deltas:
            if delta.error is not None:
                raise delta.error
            made += len(delta.token_ids)
    return time.perf_counter() - begun, made, steps


def weights_of(module: Any) -> int:
    """Elements that a step reads: all but the table of input embeddings."""
    table = module.get_input_embeddings().weight
    return sum(int(part.numel()) for part in module.parameters()) - int(table.numel())


def decode(
    core: EngineCore, model: LoadedModel, scale: Scale, bandwidth: float, batch: int
) -> Figure:
    """Steps in which `batch` requests of about `scale.context` tokens each get one token."""
    draw = random.Random(batch)
    vocab = model.facts.vocab_size
    prompts = [[draw.randrange(vocab) for _ in range(scale.context)] for _ in range(batch)]
    _, _, steps = drive(core, requests(prompts, [scale.steps + 1] * batch))
    step = statistics.median(steps[-scale.steps :])
    facts = model.facts
    context = batch * (scale.context + scale.steps // 2)
    cached = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * context
    share = 2 * (weights_of(model.module) + cached) / bandwidth / step
    return Figure(f"decode, batch {batch}", 1e3 * step, "ms a step", share)


def prefill(core: EngineCore, model: LoadedModel, scale: Scale, rate: float) -> Figure:
    """One prompt; the first one warms up."""
    taken, facts = [], model.facts
    for run in range(3):
        draw = random.Random(run)
        prompt = [draw.randrange(facts.vocab_size) for _ in range(scale.prompt)]
        took, _, _ = drive(core, requests([prompt], [1]))
        taken.append(took)
    head = model.module.get_output_embeddings().weight.numel()  # type: ignore[no-untyped-call]
    products = 2 * (weights_of(model.module) - head) * scale.prompt
    attention = 2 * facts.num_layers * facts.num_heads * facts.head_dim * scale.prompt**2
    best = min(taken[1:])
    share = (products + attention) / rate / best
    return Figure(f"prefill, {scale.prompt} tokens", scale.prompt / best, "tokens/s", share)


def workload(name: str, scale: Scale, vocab: int, run: int) -> list[Request]:
    """A: different prompts and answers; B: a common prefix. Other tokens in each run."""
    lengths, draw = random.Random(name), random.Random(f"{name}{run}")

    def text(count: int) -> list[int]:
        return [draw.randrange(vocab) for _ in range(count)]

    if name == "A":
        sizes = [
            (lengths.randint(*scale.lengths), lengths.randint(*scale.outputs))
            for _ in range(scale.requests)
        ]
        return requests([text(prompt) for prompt, _ in sizes], [output for _, output in sizes])
    prefix = text(scale.prefix)
    prompts = [prefix + text(scale.own) for _ in range(scale.requests)]
    return requests(prompts, [scale.output] * scale.requests)


def ours(core: EngineCore, name: str, scale: Scale, vocab: int) -> float:
    """Output tokens a second; the best of two runs after one that warms up."""
    rates = []
    for run in range(3):
        took, made, _ = drive(core, workload(name, scale, vocab, run))
        rates.append(made / took)
    return max(rates[1:])


def theirs(module: Any, name: str, scale: Scale, vocab: int) -> float:
    """The same by transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings: Any = GenerationConfig  # it has no types
    settings = settings(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = module.init_continuous_batching(
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.5),
    )
    manager.start()
    rates = []
    try:
        for run in range(3):
            begun, made = time.perf_counter(), 0
            left = {
                manager.add_request(
                    list(request.prompt_ids),
                    max_new_tokens=request.sampling.max_new_tokens,
                    eos_token_id=-1,
                )
                for request in workload(name, scale, vocab, run)
            }
            while left:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("its thread died")
                    continue
                if result.error:
                    raise RuntimeError(result.error)
                if result.is_finished():
                    left.discard(result.request_id)
                    made += len(result.generated_tokens)
            rates.append(made / (time.perf_counter() - begun))
    finally:
        manager.stop(block=True, timeout=30)
    return max(rates[1:])


def measure(asked: argparse.Namespace) -> list[Figure]:
    """Everything, in order; each figure is printed as it comes."""
    device = torch.device(asked.device)
    scale = TINY if asked.tiny else FULL
    figures: list[Figure] = []

    def add(figure: Figure) -> None:
        figures.append(figure)
        share = "" if figure.share is None else f"{figure.share:8.2f}"
        print(f"{figure.name:28}{figure.value:14.1f} {figure.unit:12}{share}", flush=True)

    bandwidth, rate = copy_rate(scale, device), product_rate(scale, device)
    add(Figure("copy", bandwidth / 1e9, "GB/s"))
    add(Figure("matrix product, bfloat16", rate / 1e12, "TFLOP/s"))
    module = build(llama(asked.tiny, asked.layers), device)
    model = wrap_model(module)
    vocab = model.facts.vocab_size
    core = core_of(model, scale, device, graphs=not asked.no_graphs)
    for batch in scale.batches:
        add(decode(core, model, scale, bandwidth, batch))
    add(prefill(core, model, scale, rate))
    rates = {name: ours(core, name, scale, vocab) for name in "AB"}
    for name, value in rates.items():
        add(Figure(f"{name}, engine", value, "tokens/s"))
    del core
    if asked.no_peer:
        return figures
    if device.type == "cuda":
        torch.cuda.empty_cache()
    module.set_attn_implementation("sdpa")
    for name, value in rates.items():
        try:
            peer = theirs(module, name, scale, vocab)
        except Exception as error:  # noqa: BLE001 - the peer's faults are a result too
            print(f"{name}, transformers failed: {type(error).__name__}: {error}", flush=True)
            continue
        add(Figure(f"{name}, transformers", peer, "tokens/s"))
        add(Figure(f"{name}, engine / transformers", value / peer, "times"))
    return figures


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name or device, "python": platform.python_version(), **versions}


def main() -> None:
    """Measure, print a table, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="try the harness: seconds on a CPU")
    parser.add_argument("--layers", type=int, default=32, help="fewer make a quick try")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a CUDA device, and PyTorch sees none here "
            "(--device cpu --tiny tries the harness without one)"
        )
    about = machine(asked.device)
    print(about, flush=True)
    figures = measure(asked)
    if asked.json is not None:
        made = {"machine": about, "figures": [asdict(figure) for figure in figures]}
        asked.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
