"""What the comparison with peers counts and how it runs its contestants."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.peers.contest import Plan, contest
from benchmarks.peers.contestant import Team
from benchmarks.peers.roofline import Limits, ModelSize, least_seconds
from benchmarks.peers.sharing import Seen
from benchmarks.peers.workloads import TITLES, WARM_UP, build

from ..engine.conftest import byte_tokenizer

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=8)


def common(first: list[int], second: list[int]) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


@given(SEQUENCES)
def test_the_tree_knows_the_longest_common_prefix(sequences: list[list[int]]) -> None:
    seen = Seen()
    for index, sequence in enumerate(sequences):
        longest = max((common(sequence, other) for other in sequences[:index]), default=0)
        assert seen.known(sequence) == longest
        assert seen.add(sequence) == longest
    prefixes = {tuple(each[:end]) for each in sequences for end in range(1, len(each) + 1)}
    assert len(seen) == len(prefixes)


@pytest.mark.parametrize("name", TITLES)
def test_repetitions_are_the_same_work_on_other_tokens(name: str) -> None:
    first, second, warm = build(name, 0), build(name, 1), build(name, WARM_UP)
    assert build(name, 0) == first
    for other in (second, warm):
        assert [len(ask.prompt) for ask in other.asks] == [len(ask.prompt) for ask in first.asks]
        assert [ask.output for ask in other.asks] == [ask.output for ask in first.asks]
        assert not set(first.asks) & set(other.asks)
    seen = Seen()
    for ask in (*first.primer, *first.asks):
        seen.add(ask.prompt)
    assert abs(len(seen) - first.distinct_prompt_tokens) < 100  # ids may agree by chance


def test_the_bound_of_one_stream_is_reading_all_weights_for_each_token() -> None:
    size = ModelSize(layers=1000, head=500, attention=0, cache=0)
    limits = Limits(bytes_s=3000.0, flop_s=1e30)
    workload = build("C", 0)
    assert least_seconds(workload, size, limits, "bfloat16") == pytest.approx(127.0)
    assert least_seconds(workload, size, limits, "float32") == pytest.approx(254.0)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the vocabulary that the workloads draw from."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.timeout(120)
def test_contestants_take_turns_and_those_that_fail_say_so(
    wide_model: Path, tmp_path: Path
) -> None:
    python = Path(sys.executable)
    teams = [
        Team("asyncsgl", "ours", python, str(wide_model)),
        Team("again", "ours", python, str(wide_model)),
        Team("nowhere", "ours", python, str(tmp_path / "nothing")),
        Team("silent", "no_such_module", python, str(wide_model)),
    ]
    plan = Plan("C", runs=2, threads=1, budget_s=60.0, quiet_s=0.0, most_foreign=9.0)
    notes: list[str] = []
    results = {r.team: r for r in contest(teams, "float32", plan, tmp_path, notes.append, True)}
    for name in ("asyncsgl", "again"):
        result = results[name]
        assert result.error is None
        assert (len(result.walls_s), result.output_tokens, result.same) == (2, 128, 1)
        assert result.rate == pytest.approx(128 / (sum(result.walls_s) / 2))
        assert result.phases
    for name in ("nowhere", "silent"):
        assert results[name].error
        assert results[name].rate is None
