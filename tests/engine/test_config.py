"""From settings asked for to settings decided."""

from __future__ import annotations

import pytest

from asyncsgl_engine.config import DeviceFacts, EngineConfig, ModelFacts
from asyncsgl_engine.errors import ConfigError

MODEL = ModelFacts("Tiny", 2, 1, 1, 8, 300, 1000, "float32")
CPU = DeviceFacts("cpu", 1 << 30, fast_bfloat16=False, threads=2)
FAST = DeviceFacts("cpu", 1 << 30, fast_bfloat16=True, threads=2)


def test_the_type_follows_the_processor_unless_it_is_given() -> None:
    assert EngineConfig().resolve(MODEL, CPU).dtype == "float32"
    assert EngineConfig().resolve(MODEL, FAST).dtype == "bfloat16"
    assert EngineConfig(dtype="float32").resolve(MODEL, FAST).dtype == "float32"


def test_the_cache_takes_a_share_of_memory_or_what_is_asked() -> None:
    share = EngineConfig(mem_fraction_static=0.5, dtype="float32").resolve(MODEL, CPU)
    assert share.kv_bytes == pytest.approx(1 << 29, rel=0.01)
    asked = EngineConfig(max_total_tokens=100, page_size=16).resolve(MODEL, CPU)
    assert (asked.num_pages, asked.max_total_tokens, asked.sequence_limit) == (6, 96, 96)
    with pytest.raises(ConfigError, match="less than one page"):
        EngineConfig(max_total_tokens=10, page_size=16).resolve(MODEL, CPU)


def test_a_context_longer_than_the_model_is_refused() -> None:
    assert EngineConfig(context_length=10).resolve(MODEL, CPU).sequence_limit == 10
    with pytest.raises(ConfigError, match="2000 is more than the 1000 positions Tiny"):
        EngineConfig(context_length=2000).resolve(MODEL, CPU)


def test_only_a_gpu_gets_graphs_and_a_small_one_smaller_steps() -> None:
    large, small = (DeviceFacts("cuda", size << 30, True, 2) for size in (60, 7))
    config = EngineConfig(max_total_tokens=1000)
    on_large, on_small, on_cpu = (config.resolve(MODEL, facts) for facts in (large, small, CPU))
    assert [on.cuda_graph_max_bs for on in (on_large, on_small, on_cpu)] == [256, 256, 0]
    sizes = [on.chunked_prefill_size for on in (on_large, on_small, on_cpu)]
    assert sizes == [8192, 2048, 512]
    few = EngineConfig(max_total_tokens=1000, max_running_requests=5)
    assert few.resolve(MODEL, large).cuda_graph_max_bs == 5
    without = EngineConfig(max_total_tokens=1000, disable_cuda_graph=True)
    assert without.resolve(MODEL, large).cuda_graph_max_bs == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int8"),
        ("device", "tpu"),
        ("page_size", 0),
        ("max_running_requests", -1),
        ("mem_fraction_static", 1.5),
        ("chunked_prefill_size", 1.5),
        ("cuda_graph_max_bs", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        EngineConfig(**{field: value})  # type: ignore[arg-type]


def test_a_step_without_a_limit_takes_what_the_cache_can_hold() -> None:
    facts = DeviceFacts("cpu", 8 << 30, fast_bfloat16=True, threads=2)
    found = EngineConfig(chunked_prefill_size=-1, max_total_tokens=640).resolve(MODEL, facts)
    assert found.chunked_prefill_size == found.max_total_tokens == 640


@pytest.mark.parametrize(
    ("device", "asked", "overlap"),
    [
        ("cpu", None, False),
        ("cpu", False, True),
        ("cuda", None, True),
        ("cuda", True, False),
    ],
)
def test_steps_overlap_on_gpus_and_where_it_is_asked_for(
    device: str, asked: bool | None, overlap: bool
) -> None:
    facts = DeviceFacts(device, 8 << 30, fast_bfloat16=True, threads=2)
    config = EngineConfig(disable_overlap_schedule=asked)
    assert config.resolve(MODEL, facts).overlap is overlap


def test_ranks_and_overlap_exclude_one_another() -> None:
    with pytest.raises(ConfigError, match=r"disable_overlap_schedule.*tp_size"):
        EngineConfig(tp_size=2, disable_overlap_schedule=False)
    facts = DeviceFacts("cuda", 8 << 30, fast_bfloat16=True, threads=2)
    assert not EngineConfig(tp_size=2).resolve(MODEL, facts).overlap
