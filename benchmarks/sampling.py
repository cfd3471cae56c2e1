"""What drawing tokens costs on a processor, beside transformers' logits processors.

    python benchmarks/sampling.py [--vocabularies 49152 128256] [--rows 1 16 64] [--only top-p]

Logits are drawn once: as steep as a language model's (a power law with noise), or flat, which is
the worst case of top-p. A step is all the work between the forward pass and the tokens as numbers:
counting the newest tokens, changing logits, drawing, reading the result. transformers does the
same work with its processors over the batch and `torch.multinomial`; where rows differ, or a
feature knows one setting a batch, row by row. Penalties that it has not (frequency, presence) are
left out of its side. Times are the least of several rounds, in turns; torch's threads are used by
both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from asyncsgl_engine.hub.cache import default_cache_root
from asyncsgl_engine.logprobs import LogprobReporter
from asyncsgl_engine.native import NativeSampling, build_library
from asyncsgl_engine.plan import Mask, Row, Seat
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.sampler import Sampler

LENGTH = 300  # tokens of each sequence so far, two thirds of them prompt
PROMPT = 200
ROUNDS = 7
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One kind of rows, or several by turns."""

    name: str
    samplings: tuple[Sampling, ...]
    masked: bool = False
    logprobs: int = -1
    flat: bool = False


def bias() -> tuple[tuple[int, float], ...]:
    """Twenty biases."""
    return tuple((1_000 + 7 * index, 1.0) for index in range(20))


GREEDY = Sampling(temperature=0.0)
PENALTIES = Sampling(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2)
TOP_P = Sampling(top_p=0.95, temperature=0.8)
SETTINGS = (
    Setting("greedy", (GREEDY,)),
    Setting("temperature", (Sampling(temperature=0.8),)),
    Setting("top-p", (TOP_P,)),
    Setting("top-p, flat", (TOP_P,), flat=True),
    Setting("top-k", (Sampling(top_k=40),)),
    Setting("min-p", (Sampling(min_p=0.05),)),
    Setting("penalties", (PENALTIES,)),
    Setting("greedy, bias", (Sampling(temperature=0.0, logit_bias=bias()),)),
    Setting("greedy, mask", (GREEDY,), masked=True),
    Setting("mixed", (GREEDY, Sampling(temperature=0.8), TOP_P, PENALTIES)),
    Setting("greedy, 5 logprobs", (GREEDY,), logprobs=5),
)


def draw_logits(rows: int, vocab: int, flat: bool) -> torch.Tensor:
    """Logits of a step."""
    source = torch.Generator().manual_seed(rows)
    noise = torch.randn(rows, vocab, generator=source)
    if flat:
        return noise
    ranks = torch.stack([torch.randperm(vocab, generator=source) for _ in range(rows)])
    return noise - 1.8 * (ranks + 1.0).log()


def histories(rows: int, vocab: int) -> list[list[int]]:
    """Tokens of each sequence."""
    source = np.random.default_rng(rows)
    return [source.integers(0, vocab, LENGTH).tolist() for _ in range(rows)]


def masks(rows: int, vocab: int) -> Mask:
    """Every row restricted; about a third of the vocabulary allowed."""
    bits = np.random.default_rng(1).integers(-(2**31), 2**31, (rows, -(-vocab // 32)))
    return Mask(range(rows), bits.astype(np.int32))


def ours(setting: Setting, logits: torch.Tensor, native: NativeSampling | None) -> Step:
    """A step of the engine's sampler."""
    rows, vocab = logits.shape
    sampler = Sampler(rows, vocab, logits.device, native)
    reporter = LogprobReporter(rows, vocab, native)
    tokens = histories(rows, vocab)
    for slot in range(rows):
        sampling = setting.samplings[slot % len(setting.samplings)]
        request = Request(
            str(slot),
            tuple(tokens[slot][:PROMPT]),
            sampling,
            return_logprob=setting.logprobs >= 0,
            top_logprobs_num=max(setting.logprobs, 0),
        )
        reporter.seat(slot, request)
        sampler.seat(Seat(slot, request, tokens[slot], slot, (2,)))
    mask = masks(rows, vocab) if setting.masked else None
    slots, lengths = list(range(rows)), [LENGTH] * rows
    plan = [Row(r, tokens[r][-1:], LENGTH - 1, (), 0, 1, (), sample=True) for r in slots]

    def step() -> object:
        sampler.note(plan)
        drawn = sampler.draw(logits, slots, lengths, mask)
        wanted = reporter.wanted(slots)
        if len(wanted):
            report = reporter.report(logits, wanted, wanted.tolist(), drawn)
            return report.entries(report.tensors)
        return drawn.tolist()

    return step


def processors(sampling: Sampling) -> LogitsProcessorList:
    """What transformers has for these settings."""
    made = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.logit_bias:
        made.append(SequenceBiasLogitsProcessor([[[t], b] for t, b in sampling.logit_bias]))
    if not sampling.greedy and sampling.temperature != 1.0:
        made.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        made.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        made.append(MinPLogitsWarper(sampling.min_p))
    return made


def theirs(setting: Setting, logits: torch.Tensor) -> Step:
    """A step with transformers' processors."""
    rows, vocab = logits.shape
    ids = torch.tensor(histories(rows, vocab))
    kinds = [(sampling, processors(sampling)) for sampling in setting.samplings]
    allowed: torch.Tensor | None = None
    if setting.masked:
        bits = np.unpackbits(masks(rows, vocab).bits.view(np.uint8), axis=1, bitorder="little")
        allowed = torch.from_numpy(bits[:, :vocab]) == 0

    def batch(part: torch.Tensor, rows: torch.Tensor, kind: int) -> object:
        sampling, changes = kinds[kind]
        # `generate` gives processors a float32 copy of the logits.
        scores = changes(rows, part.to(torch.float32, copy=True))  # type: ignore[arg-type]
        if allowed is not None:
            scores = scores.masked_fill(allowed, -torch.inf)
        if sampling.greedy:
            drawn = scores.argmax(-1)
        else:
            drawn = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        if setting.logprobs >= 0:
            known = part.log_softmax(-1)
            return [
                known.gather(1, drawn[:, None]).tolist(),
                *(values.tolist() for values in known.topk(setting.logprobs)),
            ]
        return drawn.tolist()

    def step() -> object:
        if len(kinds) == 1:
            return batch(logits, ids, 0)
        lines = range(rows)
        return [batch(logits[r : r + 1], ids[r : r + 1], r % len(kinds)) for r in lines]

    return step


def least(steps: Sequence[Step], seconds: float) -> list[float]:
    """The least time of each step, over rounds in which they take turns; in seconds."""
    best = [float("inf")] * len(steps)
    with torch.inference_mode():
        for step in steps:
            step()
        for _ in range(ROUNDS):
            for index, step in enumerate(steps):
                end = time.perf_counter() + seconds / ROUNDS
                while True:
                    begun = time.perf_counter()
                    step()
                    now = time.perf_counter()
                    best[index] = min(best[index], now - begun)
                    if now > end:
                        break
    return best


def main() -> None:
    """Print a line for each setting, vocabulary and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 128_256])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--only", nargs="+", default=[setting.name for setting in SETTINGS])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each side of each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without-native", action="store_true", help="PyTorch's operators only")
    asked = parser.parse_args()
    library = None if asked.without_native else build_library(default_cache_root() / "native")
    native = None if library is None else NativeSampling(library, asked.threads)
    torch.set_num_threads(asked.threads)
    print("| setting | vocabulary | rows | ours ms | transformers ms | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    for setting in SETTINGS:
        if setting.name not in asked.only:
            continue
        for vocab in asked.vocabularies:
            for rows in asked.rows:
                logits = draw_logits(rows, vocab, setting.flat)
                steps = ours(setting, logits, native), theirs(setting, logits)
                own, other = (1e3 * took for took in least(steps, asked.seconds))
                print(
                    f"| {setting.name} | {vocab:,} | {rows} | {own:.3f} | {other:.3f} "
                    f"| {other / own:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
