"""The compiled forward pass against transformers' own, and what stands in when it cannot be used."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from asyncsgl_engine.attention import TorchAttention
from asyncsgl_engine.config import DeviceFacts, EngineConfig
from asyncsgl_engine.forward import Forward, ForwardBySize, ModuleForward
from asyncsgl_engine.inputs import Batch, InputBuilder
from asyncsgl_engine.kv_cache import KVCache
from asyncsgl_engine.layered_forward import LayeredForward
from asyncsgl_engine.lowering import NotAsBefore, lower
from asyncsgl_engine.model import LoadedModel, wrap_model
from asyncsgl_engine.native import Library, NativeDecoder, read_weights
from asyncsgl_engine.native.sharing import find_groups
from asyncsgl_engine.plan import Plan, Row
from asyncsgl_engine.recipe import PreparedModel
from tests.engine.compiled import compiled

CPU = torch.device("cpu")
PAGE = 16

SIZES: dict[str, Any] = {
    "vocab_size": 301,  # no multiple of a tile's width
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2),
    "llama, tied, biased": lambda: LlamaConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3,
    ),
    "llama, wide heads": lambda: LlamaConfig(
        **SIZES, num_attention_heads=3, num_key_value_heads=1, head_dim=64
    ),
    "mistral": lambda: MistralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=128, sliding_window=40
    ),
    "qwen2": lambda: Qwen2Config(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
    ),
    "qwen3": lambda: Qwen3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    ),
}


@pytest.fixture(scope="module")
def library() -> Library:
    return compiled()


def made(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(MODELS[name]())  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases, which begin as ones and zeros
                weight.add_(torch.randn_like(weight) * 0.1)
    found: PreTrainedModel = model.to(dtype)
    return found


def cache_for(loaded: LoadedModel, dtype: torch.dtype) -> KVCache:
    facts = loaded.facts
    return KVCache(facts.num_layers, 256, PAGE, facts.num_kv_heads, facts.head_dim, dtype, CPU)


def steps(vocab: int) -> list[Batch]:
    """Prefill of several prompts, pieces of a long one, decoding, and rows that share pages."""
    draw = random.Random(5)
    pages = list(range(256))
    draw.shuffle(pages)
    builder = InputBuilder(32, PAGE, 64, needs_slots=True, device=CPU)

    def take(count: int) -> list[int]:
        return [pages.pop() for _ in range(-(-count // PAGE))]

    def row(slot: int, start: int, count: int, own: list[int], scored: int = 0) -> Row:
        tokens = [draw.randrange(vocab) for _ in range(count)]
        targets = tokens[1 : scored + 1]
        return Row(slot, tokens, start, own, 0, 0 if scored else count, targets, sample=True)

    own = {slot: take(400 if slot == 3 else 120) for slot in range(4)}
    common = take(160)
    forks = {slot: [*common, *take(64)] for slot in range(8, 14)}
    plans = [
        [row(0, 0, 1, own[0]), row(1, 0, 5, own[1], scored=3), row(2, 0, 70, own[2], scored=69)],
        [row(0, 1, 1, own[0]), row(1, 5, 1, own[1]), row(3, 0, 210, own[3])],
        [row(2, 70, 2, own[2]), row(3, 210, 130, own[3], scored=7)],
        [row(8, 0, 160, forks[8], scored=12)],
        [row(slot, 160, 3 + slot, forks[slot]) for slot in forks],
        [
            *(row(slot, 163 + slot, 1, forks[slot]) for slot in forks),
            row(0, 2, 1, own[0]),
            row(3, 340, 1, own[3]),
        ],
    ]
    return [builder.build(Plan(tuple(rows))) for rows in plans]


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_equal_those_of_transformers(name: str, library: Library) -> None:
    loaded = wrap_model(made(name, torch.float32))
    module = ModuleForward(loaded, cache_for(loaded, torch.float32), TorchAttention())
    weights = read_weights(loaded.module)
    assert weights is not None
    decoder = NativeDecoder(library, weights, cache_for(loaded, torch.float32), 2)
    for batch in steps(loaded.facts.vocab_size):
        expected = module.forward(batch)
        torch.testing.assert_close(decoder.forward(batch), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_transformers_is(name: str, library: Library) -> None:
    rounded: Any = made(name, torch.bfloat16)
    exact = wrap_model(rounded.float())
    loaded = wrap_model(made(name, torch.bfloat16))
    reference = ModuleForward(exact, cache_for(exact, torch.float32), TorchAttention())
    module = ModuleForward(loaded, cache_for(loaded, torch.bfloat16), TorchAttention())
    weights = read_weights(loaded.module)
    assert weights is not None
    decoder = NativeDecoder(library, weights, cache_for(loaded, torch.bfloat16), 2)
    for batch in steps(loaded.facts.vocab_size):
        expected = reference.forward(batch)
        ours = torch.linalg.vector_norm(decoder.forward(batch) - expected)
        theirs = torch.linalg.vector_norm(module.forward(batch).float() - expected)
        assert ours < 1.1 * theirs
        assert ours < 0.1 * torch.linalg.vector_norm(expected)


@torch.inference_mode()
def test_the_number_of_threads_changes_nothing(library: Library) -> None:
    loaded = wrap_model(made("llama", torch.float32))
    weights = read_weights(loaded.module)
    assert weights is not None
    decoders = [
        NativeDecoder(library, weights, cache_for(loaded, torch.float32), threads)
        for threads in (1, 3)
    ]
    for batch in steps(loaded.facts.vocab_size):
        one, three = (decoder.forward(batch) for decoder in decoders)
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, hidden_act="gelu"),
        LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, mlp_bias=True),
        LlamaConfig(
            **SIZES,
            num_attention_heads=6,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        ),
    ],
    ids=["another activation", "biases", "rotations that depend on the length"],
)
def test_what_is_out_of_the_ordinary_stays_with_transformers(config: Any) -> None:
    assert read_weights(AutoModelForCausalLM.from_config(config)) is None  # type: ignore[no-untyped-call]


@torch.inference_mode()
def test_a_model_that_computes_something_else_keeps_its_own_forward_pass(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = wrap_model(made("llama", torch.float32))
    layer = loaded.module.get_submodule("model.layers.0")

    def scale(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * 1.1

    layer.register_forward_hook(scale)
    cache = cache_for(loaded, torch.float32)
    batch = steps(loaded.facts.vocab_size)[0]
    machine = DeviceFacts("cpu", 1 << 30, fast_bfloat16=False, threads=2)
    config = EngineConfig(dtype="float32").resolve(loaded.facts, machine)

    def probe(forward: Forward) -> torch.Tensor:
        return forward.forward(batch).clone()

    chosen = lower(loaded, cache, TorchAttention(), config, library, probe).forward
    assert isinstance(chosen, ModuleForward)
    assert "is not used" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_pytorchs_own_operators_give_the_logits_of_transformers(
    name: str, dtype: torch.dtype
) -> None:
    loaded = wrap_model(made(name, dtype))
    module = ModuleForward(loaded, cache_for(loaded, dtype), TorchAttention())
    weights = read_weights(loaded.module)
    assert weights is not None
    layered = LayeredForward(weights, cache_for(loaded, dtype), TorchAttention())
    most = 2e-4 if dtype == torch.float32 else 0.0
    for batch in steps(loaded.facts.vocab_size):
        expected = module.forward(batch)
        torch.testing.assert_close(layered.forward(batch), expected, atol=most, rtol=most)


@pytest.mark.parametrize("prepared", [False, True])
@torch.inference_mode()
def test_where_tiles_are_faster_large_steps_are_pytorchs(prepared: bool, library: Library) -> None:
    loaded = wrap_model(made("llama, tied, biased", torch.float32))
    cache = cache_for(loaded, torch.float32)
    machine = DeviceFacts("cpu", 1 << 30, fast_bfloat16=False, threads=2)
    config = EngineConfig(dtype="float32").resolve(loaded.facts, machine)
    batches = steps(loaded.facts.vocab_size)

    def probe(forward: Forward) -> torch.Tensor:
        return forward.forward(batches[0]).clone()

    settings = (cache, TorchAttention(), config, library, probe, True)
    lowered = lower(loaded, *settings)
    assert lowered.proof is not None
    if prepared:
        weights = lowered.proof.plan.read(loaded.module.get_parameter)
        model = PreparedModel(loaded.facts, weights, lowered.proof.sample, 0)
        lowered = lower(model, *settings)
    forward = lowered.forward
    assert isinstance(forward, ForwardBySize)
    sizes = {batch.input_ids.shape[1] >= 128 for batch in batches}
    assert sizes == {True, False}
    small, large = forward.parts
    assert isinstance(small, NativeDecoder)
    assert isinstance(large, LayeredForward)
    module = ModuleForward(loaded, cache_for(loaded, torch.float32), TorchAttention())
    for batch in batches:
        expected = module.forward(batch)
        torch.testing.assert_close(forward.forward(batch), expected, atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_a_prepared_model_that_computes_something_else_is_not_run(library: Library) -> None:
    loaded = wrap_model(made("llama", torch.float32))
    cache = cache_for(loaded, torch.float32)
    machine = DeviceFacts("cpu", 1 << 30, fast_bfloat16=False, threads=2)
    config = EngineConfig(dtype="float32").resolve(loaded.facts, machine)
    batch = steps(loaded.facts.vocab_size)[0]

    def probe(forward: Forward) -> torch.Tensor:
        return forward.forward(batch).clone()

    proof = lower(loaded, cache, TorchAttention(), config, library, probe).proof
    assert proof is not None
    weights = proof.plan.read(loaded.module.get_parameter)
    model = PreparedModel(loaded.facts, weights, proof.sample, 0)
    assert lower(model, cache, TorchAttention(), config, library, probe).proof is None
    for wrong in (proof.sample * 1.1, torch.full_like(proof.sample, torch.nan)):
        other = replace(model, sample=wrong)
        with pytest.raises(NotAsBefore, match="off by"):
            lower(other, cache, TorchAttention(), config, library, probe)
    with pytest.raises(NotAsBefore, match="no compiled code"):
        lower(model, cache, TorchAttention(), config, None, probe)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 140)), max_size=12),
    st.integers(0, 9),
)
def test_groups_share_pages(rows: list[tuple[int, int, int]], garbage: int) -> None:
    """Rows are named by a first stretch of pages, a second one, and their length."""
    width = 10
    table = np.full((len(rows), width), garbage, dtype=np.int32)
    lengths = np.array([length for *_, length in rows], dtype=np.int64)
    for index, (first, second, length) in enumerate(rows):
        own = 1000 + index * width + np.arange(width)
        pages = np.where(np.arange(width) < 4, 100 + 10 * first + np.arange(width), own)
        shared = (np.arange(width) >= 4) & (np.arange(width) < 4 + second)
        pages = np.where(shared, 200 + 100 * first + np.arange(width), pages)
        last = (length - 1) // PAGE  # the page that is being written belongs to one row
        pages[last] = own[last]
        table[index, : last + 1] = pages[: last + 1]
    groups = find_groups(table, lengths, PAGE)
    assert sorted(groups.members.tolist()) == list(range(len(rows)))
    assert len(groups.first) == len(groups.common) + 1
    for group, common in enumerate(groups.common.tolist()):
        members = groups.members[groups.first[group] : groups.first[group + 1]]
        assert len(members) > 1
        assert common > 0
        assert common % PAGE == 0
        assert (lengths[members] > common).all()
        pages_shared = table[members, : common // PAGE]
        assert (pages_shared == pages_shared[0]).all()


def test_rows_that_share_much_are_grouped() -> None:
    table = np.array([[1, 2, 3, 9], [5, 6, 0, 0], [1, 2, 4, 8], [1, 2, 3, 7]], dtype=np.int32)
    lengths = np.array([60, 20, 60, 60])
    groups = find_groups(np.repeat(table, 4, axis=1), lengths * 4, PAGE)
    assert groups.members.tolist() == [0, 2, 3, 1]
    assert groups.first.tolist() == [0, 3]
    assert groups.common.tolist() == [8 * PAGE]
