"""A model cut into parts gives what the whole gives; what cannot be cut is refused by name.

The ranks are threads here, each with its part of the model, its cache and its place in the group;
`test_ranks.py` has them as the processes that they are in an engine.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from asyncsgl_engine.attention import TorchAttention
from asyncsgl_engine.config import DeviceFacts, EngineConfig, ModelFacts
from asyncsgl_engine.errors import ConfigError, ModelError, RankFailed
from asyncsgl_engine.model import reading, wrap_model
from asyncsgl_engine.parallel.group import Group, span
from asyncsgl_engine.parallel.shards import divide
from asyncsgl_engine.parallel.weights import draw
from asyncsgl_engine.parallel.wire import Kind, PlanReader, pack_plan, receive, send
from asyncsgl_engine.plan import PageCopy, Plan, Row
from asyncsgl_engine.runner import ModelRunner

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 301,  # which no number of ranks here divides
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**WIDE, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**WIDE, head_dim=16),
    "gemma2": lambda: Gemma2Config(**WIDE, head_dim=16, query_pre_attn_scalar=16),
    "phi3": lambda: Phi3Config(**WIDE),  # its heads stay whole
    "olmo2": lambda: Olmo2Config(**WIDE),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=96),
    "mixtral": lambda: MixtralConfig(**WIDE, num_local_experts=4),
}


def save(config: PreTrainedConfig, folder: Path) -> Any:
    """A random model, its biases not zero, in a folder; and the model."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def part_of(folder: Path, rank: int, size: int, ids: list[int]) -> tuple[torch.Tensor, int]:
    """What one rank computes: logits of all tokens, in two chunks and one more; its weights."""
    blueprint = draw(folder, torch.float32, size)
    model = blueprint.build(Group.connect(folder / "meeting", rank, size, CPU, 30.0), CPU)
    asked = EngineConfig(
        tp_size=size, page_size=8, max_total_tokens=64, device="cpu", dtype="float32"
    )
    config = asked.resolve(blueprint.facts, DeviceFacts("cpu", 1 << 30, False, 1), model.facts)
    runner = ModelRunner(model, config, TorchAttention())
    logits = []
    for begin, end in ((0, 9), (9, len(ids) - 1), (len(ids) - 1, len(ids))):
        row = Row(0, ids[begin:end], begin, (3, 0, 5), 0, 0, ids[begin:end], sample=False)
        logits.append(runner.compute(Plan((row,))).clone())
    return torch.cat(logits), sum(p.numel() for p in model.module.parameters())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_parts_give_the_logits_of_the_whole(kind: str, size: int, tmp_path: Path) -> None:
    whole = save(MODELS[kind](), tmp_path)
    draws = random.Random(1)
    ids = [draws.randrange(301) for _ in range(21)]
    with torch.no_grad():
        expected = whole(torch.tensor([ids])).logits[0]
    with ThreadPoolExecutor(size) as ranks:
        parts = [ranks.submit(part_of, tmp_path, rank, size, ids) for rank in range(size)]
        found, held = zip(*(part.result() for part in parts), strict=True)
    assert (found[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    # Some is whole everywhere: norms, heads that are fewer than ranks, GPT-NeoX's embedding.
    total = sum(p.numel() for p in whole.parameters())
    assert max(held) < total * (1.3 / size + 0.1)


def test_parts_are_read_where_the_files_are_several(tmp_path: Path) -> None:
    whole = save(MODELS["llama"](), tmp_path / "one")
    whole.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    for folder in ("one", "many"):
        blueprint = draw(tmp_path / folder, torch.bfloat16, 2)
        built = blueprint.build(Group(lonely(), 1, 2), CPU).module
        expected = load_file(tmp_path / "one" / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        found = built.get_parameter(name)
        assert torch.equal(found, expected[name][:, 48:].to(torch.bfloat16))
        assert found.untyped_storage().nbytes() == found.numel() * 2  # not a view of the whole


def test_models_are_read_one_after_another(tmp_path: Path) -> None:
    """Transformers changes its classes while it reads one, for all threads."""
    with ThreadPoolExecutor(1) as other:

        def read() -> str:
            with reading(tmp_path):
                return "read"

        with reading(tmp_path):
            waiting = other.submit(read)
            with pytest.raises(TimeoutError):
                waiting.result(0.1)
        assert waiting.result() == "read"


class _Lonely:
    """A group's connection that nobody asks anything of."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nothing is to be sent by {name} while a model is built")


def lonely() -> Any:
    return _Lonely()


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    save(MODELS["llama"](), tmp_path)
    config = LlamaConfig(**{**WIDE, "intermediate_size": 128})
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(96, 64\) in the files and \(128, 64\)"):
        draw(tmp_path, torch.float32, 2).build(Group(lonely(), 0, 2), CPU)


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (LlamaConfig(**{**WIDE, "num_attention_heads": 4}), 3, "3 does not divide 4 attention"),
        (
            LlamaConfig(**{**WIDE, "hidden_size": 72, "num_attention_heads": 9,
                           "num_key_value_heads": 3}), 4,
            "4 does not divide 9 attention heads of LlamaForCausalLM",
        ),
        (
            LlamaConfig(**{**WIDE, "hidden_size": 96, "num_attention_heads": 12,
                           "num_key_value_heads": 3}), 4,
            "4 neither divides the 3 key/value heads of LlamaForCausalLM nor is a multiple",
        ),
        (GPT2Config(**SIZES), 2, "GPT2LMHeadModel declares no plan for tensor parallelism"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_by_name(
    config: PreTrainedConfig, size: int, words: str, tmp_path: Path
) -> None:
    config.architectures = None
    config.save_pretrained(tmp_path)  # no weights: nothing is loaded for this
    with pytest.raises(ConfigError, match=words):
        draw(tmp_path, torch.float32, size)


def test_an_unknown_style_is_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(**WIDE)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.tp_plan = {**model.tp_plan, "model.layers.*.self_attn.q_proj": "sequence_parallel"}
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj shared as 'sequence_parallel'"):
        divide(model, wrap_model(model).facts, 2)


def test_spans_cover_everything_once() -> None:
    for total in (0, 1, 7, 300, 301):
        for parts in (1, 2, 3, 4, 8):
            spans = [span(total, parts, index) for index in range(parts)]
            assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
            assert spans[-1][1] == total
            sizes = [end - begin for begin, end in spans]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


# -- sizes ---------------------------------------------------------------------------------------

FACTS = ModelFacts("Model", 4, 8, 4, 16, 1000, 512, "float32")


def test_each_rank_has_its_share_of_the_cache_and_the_cores() -> None:
    device = DeviceFacts("cpu", 1 << 30, False, 8)
    alone = EngineConfig().resolve(FACTS, device)
    shared = EngineConfig(tp_size=4).resolve(FACTS, device, FACTS.shard(4))
    assert shared.num_pages == alone.num_pages  # of a quarter of the size each
    assert shared.kv_bytes * 4 == alone.kv_bytes
    assert (alone.num_threads, shared.num_threads, shared.tp_size) == (8, 2, 4)
    assert EngineConfig(tp_size=4, num_threads=2).resolve(FACTS, device).num_threads == 1


def test_on_gpus_each_rank_has_memory_of_its_own() -> None:
    device = DeviceFacts("cuda", 1 << 30, True, 8)
    alone = EngineConfig().resolve(FACTS, device)
    shared = EngineConfig(tp_size=2).resolve(FACTS, device, FACTS.shard(2))
    assert shared.num_pages // alone.num_pages == 2
    assert (alone.cuda_graph_max_bs, shared.cuda_graph_max_bs) == (256, 0)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_a_number_of_ranks_is_a_whole_number(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"tp_size: must be a whole number >= 1"):
        EngineConfig(tp_size=size)
    with pytest.raises(ConfigError, match="watchdog_timeout"):
        EngineConfig(watchdog_timeout=0)


# -- the wire ------------------------------------------------------------------------------------


def test_plans_arrive_as_they_were_sent() -> None:
    draws = random.Random(4)
    reader = PlanReader()
    pages: dict[int, list[int]] = {}
    for _ in range(200):
        rows = []
        for slot in draws.sample(range(6), draws.randrange(1, 6)):
            had = pages.get(slot, [])
            fresh_from = draws.randrange(len(had) + 1)
            new = [draws.randrange(10**6) for _ in range(draws.randrange(4))]
            pages[slot] = [*had[:fresh_from], *new]
            tokens = [draws.randrange(2**31 - 1) for _ in range(draws.randrange(1, 9))]
            targets = tokens[: draws.randrange(3)]
            rows.append(
                Row(
                    slot,
                    tokens,
                    draws.randrange(9999),
                    tuple(pages[slot]),
                    fresh_from,
                    draws.randrange(9),
                    targets,
                    sample=draws.random() < 0.5,
                )
            )
        copies = tuple(
            PageCopy(draws.randrange(99), draws.randrange(99), draws.randrange(1, 16))
            for _ in range(draws.randrange(3))
        )
        found = reader.read(pack_plan(Plan(tuple(rows), copies)))
        assert found.copies == copies
        for mine, sent in zip(found.rows, rows, strict=True):
            assert mine._replace(pages=tuple(mine.pages)) == sent._replace(
                targets=(0,) * len(sent.targets)
            )
            assert type(mine.sample) is bool


def test_frames_are_bounded_and_checked() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, Kind.PLAN, b"abc")
        send(ours, Kind.READY)
        assert receive(theirs) == (Kind.PLAN, b"abc")
        assert receive(theirs) == (Kind.READY, b"")
        for frame in (b"\x63\0\0\0\1\0\0\0", b"\1\0\0\0\xff\xff\xff\xff"):
            ours.sendall(frame)
            with pytest.raises(RankFailed, match="frame of kind"):
                receive(theirs)
        ours.sendall(b"\1\0\0\0\4\0\0\0ab")  # and no more
        ours.close()
        assert receive(theirs) is None
