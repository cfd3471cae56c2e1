"""Run by `test_triton.py` in a process of its own, where Triton interprets its kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from asyncsgl_engine.attention import LayerCall, StepContext
from asyncsgl_engine.attention.triton_attention import Tiles, TritonAttention
from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.forward import ModuleForward
from asyncsgl_engine.graphs import Replay, StaticInputs
from asyncsgl_engine.inputs import InputBuilder
from asyncsgl_engine.kv_cache import KVCache
from asyncsgl_engine.model import wrap_model
from asyncsgl_engine.native import read_weights
from asyncsgl_engine.plan import Plan, Row
from asyncsgl_engine.triton_forward import TritonForward
from tests.engine.attention_cases import Shape, check
from tests.engine.direct import core_for, generate, logit_errors, serve, workload

CPU = torch.device("cpu")
# Small, so that small shapes take several: the interpreter takes about a millisecond for each.
SMALL = Tiles(decode=16, lines=32, prefill=16, warps=4, stages=1)
LENGTHS = ((0, 1), (36, 1), (70, 1), (15, 1), (0, 20), (40, 15), (31, 2))


@pytest.fixture(autouse=True)
def interpreted() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize(
    ("shape", "dtype", "processors"),
    [
        (Shape(9, 3, 64, 16), torch.float32, 1),
        (Shape(9, 3, 64, 16), torch.bfloat16, 32),
        (Shape(8, 2, 128, 16, softcap=5.0), torch.bfloat16, 1),
        (Shape(8, 2, 128, 64), torch.float16, 32),
        (Shape(2, 2, 256, 16), torch.float32, 32),
        (Shape(4, 2, 256, 32, window=33), torch.bfloat16, 1),
        (Shape(4, 2, 96, 16, window=33, softcap=2.0), torch.float32, 32),
        (Shape(8, 1, 80, 16, softcap=1.0), torch.float16, 1),
        (Shape(8, 1, 40, 8, window=20), torch.bfloat16, 32),
        (Shape(4, 4, 16, 1), torch.float32, 32),
        (Shape(10, 2, 8, 5, window=1), torch.float32, 32),
        (Shape(36, 1, 16, 16), torch.float32, 1),
    ],
)
def test_tokens_attend_to_their_own_pages(
    shape: Shape, dtype: torch.dtype, processors: int
) -> None:
    check(TritonAttention(processors, SMALL), shape, dtype, CPU, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiles_of_a_gpu(dtype: torch.dtype) -> None:
    check(TritonAttention(132), Shape(4, 2, 64, 16), dtype, CPU, ((0, 1), (150, 1), (90, 70)))


@pytest.mark.parametrize("lengths", [((0, 1), (20, 1)), ((0, 17), (5, 16), (64, 33))])
def test_steps_of_one_kind(lengths: tuple[tuple[int, int], ...]) -> None:
    check(TritonAttention(4, SMALL), Shape(4, 2, 16, 16), torch.float32, CPU, lengths)


def test_padding_of_a_graph_reads_and_writes_nothing() -> None:
    inputs = StaticInputs(rows=4, pages=4, page_size=8, device=CPU)
    row = Row(0, [1], 20, [3, 1, 2], 0, 1, (), sample=True)
    inputs.load(InputBuilder(1, 8, 4, False, CPU, True).build(Plan((row,))), 4)
    cache = KVCache(1, 5, 8, 2, 16, torch.float32, CPU)
    for part in (cache.keys[0], cache.values[0]):
        part.fill_(math.nan)
        part[[24 + place for place in range(8)] + [8 + place for place in range(8)]] = 1.0
        part[16:20] = 1.0
    query, key, value = torch.ones(4, 4, 16), torch.ones(4, 2, 16), torch.ones(4, 2, 16)
    backend = TritonAttention(32, SMALL)
    call = LayerCall(query, key, value, 0, 0.25, None, None)
    out = backend.attend(call, StepContext(inputs.view(4), cache, backend))
    torch.testing.assert_close(out[0], torch.ones(4, 16))
    assert torch.equal(out[1:], torch.zeros(3, 4, 16))
    written = ~cache.keys[0].isnan().any(-1).any(-1)
    assert written.nonzero()[:, 0].tolist() == [*range(8, 21), *range(24, 32)]


class Again:
    """Captures nothing: a replay computes again, into the same tensor."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, compute: Replay) -> Replay:
        kept = compute()

        def replay() -> torch.Tensor:
            self.replays += 1
            kept.copy_(compute())
            return kept

        return replay


@pytest.mark.parametrize(
    ("kind", "page_size", "graphs"),
    [("llama", 16, 4), ("qwen2", 4, 0), ("gpt2", 1, 4)],
)
def test_greedy_tokens_equal_generate(
    kind: str, page_size: int, graphs: int, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(kind)
    config = EngineConfig(
        model_path=str(folder),
        dtype="float32",
        device="cpu",
        page_size=page_size,
        chunked_prefill_size=19,
        max_total_tokens=640,
        debug_check=True,
    )
    # Sometimes more rows decode than the largest graph holds.
    requests = workload(5, longest=24, output=5)
    capture = Again()
    core = core_for(config, TritonAttention(8, SMALL), graphs, capture)
    made = serve(core, requests)
    assert core.statistics().cached_tokens > 0
    assert made == generate(folder, requests)
    assert bool(capture.replays) == bool(graphs)


def test_bfloat16_is_as_close_as_transformers_own(model_folder: Callable[[str], Path]) -> None:
    ours, theirs = logit_errors(model_folder("llama"), TritonAttention(8, SMALL), CPU)
    assert 0.0 < ours < 1.5 * theirs


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    ("config", "dtype", "close"),
    [
        (LlamaConfig(**SIZES, head_dim=24, attention_bias=True), torch.float32, 1e-5),
        (Qwen2Config(**SIZES), torch.float32, 1e-5),
        (Qwen3Config(**SIZES, head_dim=16), torch.float32, 1e-5),
        (Qwen3Config(**SIZES, head_dim=16), torch.bfloat16, 0.05),
    ],
    ids=["llama", "qwen2", "qwen3", "qwen3-bfloat16"],
)
def test_a_forward_pass_in_few_launches_is_the_modules(
    config: PreTrainedConfig, dtype: torch.dtype, close: float
) -> None:
    torch.manual_seed(2)
    module: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for parameter in module.parameters():
        if parameter.dim() == 1:  # norms are 1 and biases 0 before they are trained
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model = wrap_model(module)
    facts = model.facts
    attention = TritonAttention(8, SMALL)
    cache = KVCache(facts.num_layers, 8, 8, facts.num_kv_heads, facts.head_dim, dtype, CPU)
    weights = read_weights(module)
    assert weights is not None
    before = module.model.layers[0].mlp.up_proj.weight.detach().clone()
    few = TritonForward(weights, cache, attention, positions=128)
    assert torch.equal(module.model.layers[0].mlp.up_proj.weight, before)
    builder = InputBuilder(2, 8, 4, False, CPU, True)
    for rows in (
        [Row(0, range(20), 0, (5, 2, 7), 0, 0, range(20), True)],
        [
            Row(0, (9,), 20, (5, 2, 7), 0, 1, (), True),
            Row(1, range(30, 37), 0, (1,), 0, 7, (), True),
        ],
    ):
        batch = builder.build(Plan(tuple(rows)))
        with torch.inference_mode():
            expected = ModuleForward(model, cache, attention).forward(batch).float()
            found = few.forward(batch).float()
        error = (found - expected).norm() / expected.norm()
        assert 0.0 < float(error) < close
