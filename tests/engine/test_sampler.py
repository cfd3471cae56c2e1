"""Drawing tokens, against transformers' logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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

from asyncsgl_engine.drawing import NO_TOKEN, Drawer, Draws, TorchDrawer, pick, refused_tokens
from asyncsgl_engine.logits import LogitEditor
from asyncsgl_engine.logprobs import Describer, LogprobReporter, TorchDescriber
from asyncsgl_engine.native import Library, NativeSampling
from asyncsgl_engine.plan import Mask, Row, Seat
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.sampler import Sampler, uniform
from tests.engine.compiled import compiled

pytestmark = pytest.mark.timeout(120)  # the first may have to compile

VOCAB = 1000
CPU = torch.device("cpu")


def seat(
    slot: int, sampling: Sampling, prompt: Sequence[int] = (1,), output: Sequence[int] = ()
) -> Seat:
    request = Request(f"r{slot}", tuple(prompt), sampling)
    seed = 0 if sampling.seed is None else sampling.seed
    return Seat(slot, request, [*prompt, *output], seed, (7, 8))


def row(tokens: Sequence[int], start: int) -> Row:
    return Row(0, tokens, start, (), 0, len(tokens), (), sample=True)


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(scope="module")
def library() -> Library:
    return compiled()


@pytest.fixture(params=["torch", "native"])
def drawer(request: pytest.FixtureRequest) -> Drawer:
    """Both ways to draw."""
    if request.param == "torch":
        return TorchDrawer(VOCAB, CPU)
    return NativeSampling(request.getfixturevalue("library"), threads=2)


def draw_many(
    drawer: Drawer, sampling: dict[str, Any], logits: torch.Tensor, count: int
) -> torch.Tensor:
    """How often each token is drawn from one row of logits by many seeds."""
    sampler = Sampler(count, VOCAB, CPU, drawer)
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
        ({"top_k": 400, "top_p": 0.3}, [TopKLogitsWarper(400), TopPLogitsWarper(0.3)]),
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
    sampling: dict[str, Any], processors: list[Any], drawer: Drawer
) -> None:
    logits, count = logits_of(3), 20_000
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    expected = LogitsProcessorList(processors)(ids, logits.clone()).softmax(-1)[0]
    seen = draw_many(drawer, sampling, logits, count)
    assert not seen[expected == 0].any()
    likely = expected * count > 20
    error = (seen[likely] - expected[likely] * count).abs() / (expected[likely] * count).sqrt()
    assert float(error.max()) < 5.0


@pytest.mark.parametrize("flat", [True, False])
def test_wide_distributions_use_the_whole_vocabulary(flat: bool, drawer: Drawer) -> None:
    logits = torch.zeros(1, VOCAB) if flat else torch.linspace(0, 0.5, VOCAB)[None]
    seen = draw_many(drawer, {"top_p": 0.95}, logits, 20_000)
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
    ids: Any = torch.tensor([prompt + output])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    expected[0, 5] -= 2 * 0.5 + 0.25 + 1.0
    expected[0, 6] -= 0.5 + 0.25
    expected[0, 9] += 2.0
    for given in (logits, logits.bfloat16()):
        with editor.edited(given, np.array([1]), np.array([3])) as edited:
            if given is logits:
                torch.testing.assert_close(edited, expected)
            else:
                assert edited.dtype == torch.float32
    assert torch.equal(logits, logits_of(5)), "the model's own logits are as they were"


def test_tokens_are_counted_once_however_they_arrive() -> None:
    sampling = Sampling(frequency_penalty=1.0)
    whole, pieces, drawn = (LogitEditor(1, VOCAB, CPU) for _ in range(3))
    whole.seat(seat(0, sampling, [1, 2], [3, 4, 3]))
    pieces.seat(seat(0, sampling, [1, 2], [3]))
    drawn.seat(seat(0, sampling, [1, 2], [3]))
    pieces.note([row([1, 2, 3], 0)])
    pieces.note([row([4], 3)])
    drawn.take(np.array([0]), np.array([3]), torch.tensor([4]))
    for editor in (pieces, drawn):
        editor.note([row([3], 4)])
        editor.note([row([4, 3], 3)])
    where, made = np.array([0]), np.array([3])
    for editor in (whole, pieces, drawn):
        with editor.edited(logits_of(1), where, made) as edited:
            changed = edited - logits_of(1)
        assert changed.nonzero()[:, 1].tolist() == [3, 4]
        assert changed[0, 3:5].tolist() == pytest.approx([-2.0, -1.0])


def test_stop_tokens_wait_for_min_new_tokens(drawer: Drawer) -> None:
    sampler = Sampler(1, VOCAB, CPU, drawer)
    sampler.seat(seat(0, Sampling(temperature=0.0, min_new_tokens=2), [1]))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8], logits[0, 20] = 9.0, 8.0, 7.0
    assert sampler.draw(logits, [0], [1], None).tolist() == [20]
    assert sampler.draw(logits, [0], [2], None).tolist() == [20]
    assert sampler.draw(logits, [0], [3], None).tolist() == [7]


def test_a_mask_restricts_only_its_rows(drawer: Drawer) -> None:
    sampler = Sampler(2, VOCAB, CPU, drawer)
    for slot in range(2):
        sampler.seat(seat(slot, Sampling(temperature=0.0)))
    bits = np.zeros((1, -(-VOCAB // 32)), dtype=np.int32)
    bits[0, 70 // 32] = 1 << (70 % 32)
    logits = logits_of(2, rows=2)
    free = int(logits[0].argmax())
    assert sampler.draw(logits, [0, 1], [1, 1], Mask([1], bits)).tolist() == [free, 70]


def test_a_seed_gives_the_same_tokens_among_any_batch_mates(drawer: Drawer) -> None:
    logits = logits_of(11, rows=6)
    kinds = [
        Sampling(seed=5),
        Sampling(temperature=0.0),
        Sampling(seed=6, top_p=0.9),
        Sampling(seed=7, top_k=3),
        Sampling(seed=8, temperature=2.0, presence_penalty=1.0),
        Sampling(seed=9, min_p=0.1),
    ]
    sampler = Sampler(6, VOCAB, CPU, drawer)
    for slot, kind in enumerate(kinds):
        sampler.seat(seat(slot, kind, [1, 2]))
    together = sampler.draw(logits, range(6), [2] * 6, None).tolist()
    alone = [sampler.draw(logits[s : s + 1], [s], [2], None).item() for s in range(6)]
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


def expected_token(logits: torch.Tensor, draws: Draws, row: int) -> int:
    """What is to be drawn from one row of logits, in double precision and without haste."""
    line = logits[row].numpy().astype(np.float64)
    if draws.heat[row] == 0.0:
        return int(line.argmax())
    exponents = (line - line.max()) / draws.heat[row]
    order = np.arange(len(line))
    plain = draws.top_k[row] >= len(line) and draws.top_p[row] == 1.0 and draws.min_p[row] == 0.0
    if not plain:
        order = np.argsort(-exponents, kind="stable")[: draws.top_k[row]]
    weights = np.exp(exponents[order])
    if not plain:
        before = weights.cumsum() - weights
        kept = (before < draws.top_p[row] * weights.sum()) | (draws.top_p[row] == 1.0)
        kept &= weights >= draws.min_p[row]
        weights = np.where(kept, weights, 0.0)
    reached = weights.cumsum()
    return int(order[np.searchsorted(reached, draws.chance[row] * reached[-1], side="right")])


@pytest.mark.parametrize("vocab", [VOCAB, 49_152])
@pytest.mark.parametrize("steep", [False, True])
def test_draws_invert_the_distribution_function(drawer: Drawer, vocab: int, steep: bool) -> None:
    """In all settings, on steep and flat distributions, with masks and without."""
    if isinstance(drawer, TorchDrawer):
        drawer = TorchDrawer(vocab, CPU)
    rows = 64
    source = np.random.default_rng(vocab + steep)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
    if steep:
        logits -= 2.0 * torch.from_numpy(source.permuted(np.arange(vocab)) + 1.0).log().float()
    draws = Draws(
        source.choice([0.0, 0.5, 1.0, 2.0], rows).astype(np.float32),
        source.choice([1.0, 0.95, 0.3], rows).astype(np.float32),
        source.choice([1, 7, 200, 600, vocab], rows),
        source.choice([0.0, 0.02, 0.5], rows).astype(np.float32),
        source.random(rows).astype(np.float32),
    )
    bits = source.integers(-(2**31), 2**31, (20, -(-vocab // 32)), dtype=np.int64)
    bits[:4, 1:] = 0  # so few are allowed that whole stretches are not
    mask = Mask(range(5, 25), bits.astype(np.int32))
    allowed = np.unpackbits(mask.bits.view(np.uint8), axis=1, bitorder="little")[:, :vocab] == 1
    restricted = logits.clone()
    restricted[5:25].masked_fill_(torch.from_numpy(~allowed), -torch.inf)
    for given, limits in ((logits, None), (restricted, mask)):
        drawn = drawer.draw(logits, draws, limits).tolist()
        assert drawn == [expected_token(given, draws, row) for row in range(rows)]
    alone = [drawer.draw(logits[r : r + 1], draws.of(np.array([r])), None).item() for r in range(9)]
    assert alone == drawer.draw(logits, draws, None).tolist()[:9]


@pytest.mark.parametrize("heat", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_where_there_are_no_numbers_nothing_is_drawn(
    heat: float, top_p: float, drawer: Drawer
) -> None:
    logits = logits_of(1, rows=5)
    logits[0, 999] = torch.nan
    logits[1] = torch.nan
    logits[2, 500] = torch.inf
    logits[3, :900] = -torch.inf
    ones = np.ones(5, dtype=np.float32)
    top_k = np.full(5, VOCAB)
    draws = Draws(ones * heat, ones * np.float32(top_p), top_k, ones * 0, ones * 0.5)
    nothing = Mask([4], np.zeros((1, 32), dtype=np.int32))
    tokens = drawer.draw(logits, draws, nothing).tolist()
    assert [tokens[row] for row in (0, 1, 2, 4)] == [NO_TOKEN] * 4
    assert tokens[3] >= 900


@pytest.fixture(params=["torch", "native"])
def describer(request: pytest.FixtureRequest) -> Describer:
    """Both ways to describe."""
    if request.param == "torch":
        return TorchDescriber()
    return NativeSampling(request.getfixturevalue("library"), threads=2)


def test_reports_give_each_position_what_its_request_wants(describer: Describer) -> None:
    logits = logits_of(9, rows=70) * 2
    reporter = LogprobReporter(4, VOCAB, describer)
    asked: list[tuple[int, tuple[int, ...]]] = [(0, ()), (3, (7,)), (VOCAB + 1, (999, 0)), (0, ())]
    for slot, (top, named) in enumerate(asked):
        wants = Request(f"r{slot}", (1,))
        if slot != 3:
            wants = replace(
                wants, return_logprob=True, top_logprobs_num=top, token_ids_logprob=named
            )
        reporter.seat(slot, wants)
    assert reporter.wanted([3, 1, 2, 3, 0]).tolist() == [1, 2, 4]
    rows = np.arange(1, 70, 2)
    slots = [int(row) % 3 for row in rows]
    tokens = torch.from_numpy(rows * 11)
    report = reporter.report(logits, rows, slots, tokens)
    entries = report.entries(report.tensors)
    known = logits.double().log_softmax(-1)
    for row, slot, token, entry in zip(rows, slots, tokens.tolist(), entries, strict=True):
        top, named = asked[slot]
        best = known[row].topk(min(top, VOCAB))
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(known[row, token].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [token for token, _ in entry.chosen] == list(named)
        expected = known[row, list(named)].tolist()
        assert [value for _, value in entry.chosen] == pytest.approx(expected, abs=1e-5)
