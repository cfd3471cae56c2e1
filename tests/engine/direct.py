"""A core over a model folder and an attention of choice, stepped by hand."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from asyncsgl_engine.attention import AttentionBackend, StepContext
from asyncsgl_engine.config import DeviceFacts, EngineConfig
from asyncsgl_engine.constraints import Constraints
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.graphs import Capture
from asyncsgl_engine.inputs import InputBuilder
from asyncsgl_engine.kv_cache import KVCache
from asyncsgl_engine.model import load_model
from asyncsgl_engine.plan import Plan, Row
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.runner import ModelRunner
from asyncsgl_engine.tokenizer import Tokenizer
from tests.engine.conftest import byte_tokenizer

__all__ = ["core_for", "generate", "logit_errors", "serve", "workload"]


def core_for(
    config: EngineConfig,
    attention: AttentionBackend,
    graphs: int = 0,
    capture: Capture | None = None,
    constraints: Constraints | None = None,
) -> EngineCore:
    """A core whose runner attends with `attention` and captures steps of up to `graphs` rows."""
    device = torch.device(config.device)
    model = load_model(Path(config.model_path), getattr(torch, config.dtype), device)
    facts = DeviceFacts(config.device, 1 << 30, True, 1)
    resolved = replace(config.resolve(model.facts, facts), cuda_graph_max_bs=graphs)
    runner = ModelRunner(model, resolved, attention, capture=capture)

    def no_grammars() -> Any:
        raise AssertionError("no request here has a grammar")

    tokenizer = Tokenizer(byte_tokenizer())
    return EngineCore(resolved, runner, tokenizer, constraints or Constraints(no_grammars))


def workload(count: int, longest: int, output: int, seed: int = 0) -> list[Request]:
    """Greedy requests; every other one begins with pieces of the same text."""
    draw = random.Random(seed)
    common = [draw.randrange(256) for _ in range(longest)]
    made = []
    for number in range(count):
        shared = common[: draw.randrange(longest)] if number % 2 else []
        own = [draw.randrange(256) for _ in range(draw.randrange(1, longest))]
        greedy = Sampling(draw.randrange(1, output + 1), temperature=0.0, ignore_eos=True)
        made.append(Request(f"r{number}", (*shared, *own), greedy))
    return made


def serve(core: EngineCore, requests: Iterable[Request]) -> dict[str, tuple[int, ...]]:
    """Each request's tokens; one request arrives each step, so that prefill meets decoding."""
    tokens: dict[str, tuple[int, ...]] = {}
    waiting = list(requests)
    while waiting or core.busy:
        for delta in core.step([waiting.pop(0)] if waiting else []):
            assert delta.error is None, delta.error
            tokens[delta.request_id] = tokens.get(delta.request_id, ()) + tuple(delta.token_ids)
    core.check()
    return tokens


def generate(
    folder: Path, requests: Sequence[Request], device: str = "cpu"
) -> dict[str, tuple[int, ...]]:
    """The same by transformers' own `generate`, one request after the other, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    tokens = {}
    for request in requests:
        ids = torch.tensor([request.prompt_ids], device=device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens[request.request_id] = tuple(out[0, ids.shape[1] :].tolist())
    return tokens


@torch.inference_mode()
def logit_errors(
    folder: Path, attention: AttentionBackend, device: torch.device
) -> tuple[float, float]:
    """How far logits in bfloat16 are from those in float32: ours, and transformers' own.

    Returns:
        Root mean squares of the differences, over the tokens of a prompt that is computed in two
        chunks and a last token of its own.
    """
    draw = random.Random(3)
    tokens = [draw.randrange(256) for _ in range(41)]
    ids = torch.tensor([tokens], device=device)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        module.to(device)
        logits.append(module(ids, use_cache=False).logits[0].float())
    model = load_model(folder, torch.bfloat16, device)
    facts = model.facts
    cache = KVCache(
        facts.num_layers, 8, 16, facts.num_kv_heads, facts.head_dim, torch.bfloat16, device
    )
    builder = InputBuilder(1, 16, 8, attention.needs_slots, device, attention.needs_tables)
    parts = []
    for start, end in ((0, 24), (24, 40), (40, 41)):
        row = Row(0, tokens[start:end], start, (5, 2, 7), 0, 0, tokens[start:end], sample=False)
        batch = builder.build(Plan((row,)))
        context = StepContext(batch, cache, attention)
        made = model.logits(batch.input_ids, batch.position_ids, batch.logit_rows, context)
        parts.append(made.float())
    exact, theirs, ours = *logits, torch.cat(parts)
    return float((ours - exact).square().mean().sqrt()), float(
        (theirs - exact).square().mean().sqrt()
    )
