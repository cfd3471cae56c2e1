"""Drawing tokens, against transformers' logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from asyncsgl_engine.logits import LogitEditor, refused_tokens
from asyncsgl_engine.plan import Mask, Seat
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.sampler import Sampler, pick, uniform

VOCAB = 1000
CPU = torch.device("cpu")


def seat(
    slot: int, sampling: Sampling, prompt: Sequence[int] = (1,), output: Sequence[int] = ()
) -> Seat:
    request = Request(f"r{slot}", tuple(prompt), sampling)
    seed = 0 if sampling.seed is None else sampling.seed
    return Seat(slot, request, [*prompt, *output], seed, (7, 8))


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draw_many(sampling: dict[str, Any], logits: torch.Tensor, count: int) -> torch.Tensor:
    """How often each token is drawn from one row of logits by many seeds."""
    sampler = Sampler(count, VOCAB, CPU)
    for slot in range(count):
        sampler.seat(seat(slot, Sampling(seed=slot, **sampling)))
    drawn = sampler.draw(logits.expand(count, -1), range(count), [1] * count, None)
    return torch.bincount(drawn, minlength=VOCAB)


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 400}, [TopKLogitsWarper(400)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 0.9999}, [TopPLogitsWarper(0.9999)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
            [
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(50),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_draws_follow_the_distribution_of_the_processors(
    sampling: dict[str, Any], processors: list[Any]
) -> None:
    logits, count = logits_of(3), 20_000
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    expected = LogitsProcessorList(processors)(ids, logits.clone()).softmax(-1)[0]
    seen = draw_many(sampling, logits, count)
    assert not seen[expected == 0].any()
    likely = expected * count > 20
    error = (seen[likely] - expected[likely] * count).abs() / (expected[likely] * count).sqrt()
    assert float(error.max()) < 5.0


@pytest.mark.parametrize("flat", [True, False])
def test_wide_distributions_use_the_whole_vocabulary(flat: bool) -> None:
    logits = torch.zeros(1, VOCAB) if flat else torch.linspace(0, 0.5, VOCAB)[None]
    seen = draw_many({"top_p": 0.95}, logits, 20_000)
    assert int((seen > 0).sum()) == pytest.approx(0.95 * VOCAB, abs=25)


def test_penalties_and_bias_match_transformers_and_openai() -> None:
    prompt, output = [3, 4, 4], [5, 5, 6]
    sampling = Sampling(
        temperature=0.0,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias=((9, 2.0), (5, -1.0)),
    )
    logits = logits_of(5)
    editor = LogitEditor(2, VOCAB, CPU)
    editor.seat(seat(1, sampling, prompt, output))
    edited = editor.edit(logits, np.array([1]), np.array([3]), None)
    ids: Any = torch.tensor([prompt + output])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    expected[0, 5] -= 2 * 0.5 + 0.25 + 1.0
    expected[0, 6] -= 0.5 + 0.25
    expected[0, 9] += 2.0
    torch.testing.assert_close(edited, expected)
    assert torch.equal(logits, logits_of(5)), "the model's own logits are left alone"


def test_tokens_are_counted_once_however_they_arrive() -> None:
    sampling = Sampling(frequency_penalty=1.0)
    whole, pieces = LogitEditor(1, VOCAB, CPU), LogitEditor(1, VOCAB, CPU)
    whole.seat(seat(0, sampling, [1, 2], [3, 4, 3]))
    pieces.seat(seat(0, sampling, [1, 2], [3]))
    pieces.note(0, [1, 2, 3], 0)
    pieces.note(0, [4], 3)
    pieces.note(0, [3], 4)
    pieces.note(0, [4, 3], 3)
    where, made = np.array([0]), np.array([3])
    logits = logits_of(1)
    assert torch.equal(
        whole.edit(logits, where, made, None), pieces.edit(logits, where, made, None)
    )


def test_stop_tokens_wait_for_min_new_tokens() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    sampler.seat(seat(0, Sampling(temperature=0.0, min_new_tokens=2), [1]))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8], logits[0, 20] = 9.0, 8.0, 7.0
    assert sampler.draw(logits, [0], [1], None).tolist() == [20]
    assert sampler.draw(logits, [0], [2], None).tolist() == [20]
    assert sampler.draw(logits, [0], [3], None).tolist() == [7]


def test_a_mask_restricts_only_its_rows() -> None:
    sampler = Sampler(2, VOCAB, CPU)
    for slot in range(2):
        sampler.seat(seat(slot, Sampling(temperature=0.0)))
    bits = np.zeros((1, -(-VOCAB // 32)), dtype=np.int32)
    bits[0, 70 // 32] = 1 << (70 % 32)
    logits = logits_of(2, rows=2)
    free = int(logits[0].argmax())
    assert sampler.draw(logits, [0, 1], [1, 1], Mask([1], bits)).tolist() == [free, 70]


def test_a_seed_gives_the_same_tokens_among_any_batch_mates() -> None:
    logits = logits_of(11, rows=6)
    kinds = [
        Sampling(seed=5),
        Sampling(temperature=0.0),
        Sampling(seed=6, top_p=0.9),
        Sampling(seed=7, top_k=3),
        Sampling(seed=8, temperature=2.0, presence_penalty=1.0),
        Sampling(seed=9, min_p=0.1),
    ]
    sampler = Sampler(6, VOCAB, CPU)
    for slot, kind in enumerate(kinds):
        sampler.seat(seat(slot, kind, [1, 2]))
    together = sampler.draw(logits, range(6), [2] * 6, None).tolist()
    alone = [int(sampler.draw(logits[s : s + 1], [s], [2], None)) for s in range(6)]
    backwards = sampler.draw(logits.flip(0), range(5, -1, -1), [2] * 6, None).tolist()
    assert together == alone == backwards[::-1]
    later = sampler.draw(logits, range(6), [3] * 6, None).tolist()
    assert later[1] == together[1]
    assert later != together


def test_noise_is_uniform_and_its_streams_differ() -> None:
    counters = np.arange(50_000, dtype=np.uint64)
    one = uniform(np.zeros(50_000, dtype=np.uint64), counters)
    two = uniform(np.ones(50_000, dtype=np.uint64), counters)
    for values in (one, two):
        counts = np.histogram(values, bins=20, range=(0.0, 1.0))[0]
        assert abs(counts - 2500).max() < 300
        assert values.max() < 1.0
    assert abs(float(np.corrcoef(one, two)[0, 1])) < 0.02
    assert abs(float(np.corrcoef(one[1:], one[:-1])[0, 1])) < 0.02


def test_a_token_without_weight_is_never_picked() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]])
    for chance in (0.0, 0.33, 0.34, 0.9999999):
        assert int(pick(weights, torch.tensor([chance]))[0]) in (1, 3)


def test_masks_are_unpacked_the_same_on_other_devices() -> None:
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 7), dtype=np.int32)
    bits[0, 0], bits[0, 1] = -1, np.int32(-(2**31))
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    assert torch.equal(refused_tokens(torch.from_numpy(bits)), torch.from_numpy(allowed) == 0)
