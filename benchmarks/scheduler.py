"""What the books cost: microseconds a step of the scheduler and of the whole core, without a model.

    python benchmarks/scheduler.py [--steps 400]

A runner that answers from a rule stands in for the model, so all the time is ours. Each load is
brought to a steady state first. `plan` is the scheduler's decision alone; `step` is all that the
engine's thread does besides the forward pass: plan, commit, decode text, find stops, word deltas.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asyncsgl_engine.config import ModelFacts, ResolvedConfig
from asyncsgl_engine.constraints import Constraints
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.hub import resolve_model
from asyncsgl_engine.plan import Mask, Outcome, Plan, Seat
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.scheduler import Scheduler
from asyncsgl_engine.tokenizer import Tokenizer

VOCAB = 49_152


class Repeated:
    """Tokens drawn from a rule."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def draw(self, mask: Mask | None, forced: Mapping[int, int]) -> None:
        """Nothing to do."""

    def outcome(self) -> Outcome:
        """One token for each row that wants one."""
        return Outcome([1000 + row.start % 20_000 if row.sample else -1 for row in self._plan.rows])


class Parrot:
    """Computes nothing."""

    def seat(self, seat: Seat) -> None:
        """Nothing to keep."""

    def launch(self, plan: Plan) -> Repeated:
        """The pass, done already."""
        return Repeated(plan)


def settings(slots: int, pages: int, chunk: int = 512) -> ResolvedConfig:
    """A configuration with the default model's sizes."""
    return ResolvedConfig(
        model_path="none",
        model=ModelFacts("None", 30, 9, 3, 64, VOCAB, 8192, "float32"),
        device="cpu",
        dtype="float32",
        page_size=16,
        num_pages=pages,
        kv_bytes=0,
        max_total_tokens=16 * pages,
        max_running_requests=slots,
        chunked_prefill_size=chunk,
        context_length=8192,
        max_queued_requests=1_000_000,
        radix_cache=True,
        random_seed=0,
        debug_check=False,
        num_threads=1,
        native=False,
    )


@dataclass(frozen=True)
class Load:
    """Requests of a kind: how many there are, and what they are like."""

    name: str
    slots: int
    pages: int
    requests: int
    prompt: Callable[[random.Random, int], tuple[int, ...]]
    output: int


def plain(draw: random.Random, _: int) -> tuple[int, ...]:
    """A prompt of its own, 200 tokens."""
    return tuple(draw.randrange(VOCAB) for _ in range(200))


def shared(draw: random.Random, _: int) -> tuple[int, ...]:
    """1,024 common tokens and 32 of its own."""
    return (*range(1024), *(draw.randrange(VOCAB) for _ in range(32)))


def long(draw: random.Random, _: int) -> tuple[int, ...]:
    """A prompt of 4,000 tokens, half of them common."""
    return (*range(2000), *(draw.randrange(VOCAB) for _ in range(2000)))


LOADS = (
    Load("128 decode", 128, 60_000, 128, plain, 4000),
    Load("128 decode, 10,000 wait", 128, 60_000, 10_128, plain, 4000),
    Load("128 decode, cache full of 100,000 pages", 128, 100_000, 10_128, plain, 64),
    Load("come and go, 10,000 wait, shared prefix", 128, 60_000, 10_128, shared, 16),
    Load("come and go, 1,000 wait, long prompts", 32, 20_000, 1_000, long, 8),
)


def requests(load: Load) -> list[Request]:
    """The load's requests, the same at every call."""
    draw = random.Random(5)
    return [
        Request(
            f"r{number}",
            load.prompt(draw, number),
            Sampling(max_new_tokens=load.output, temperature=0.0, ignore_eos=True),
        )
        for number in range(load.requests)
    ]


def scheduler_alone(load: Load, steps: int) -> tuple[float, float]:
    """Median and worst seconds of `plan` over some steps.

    They are the thread's own: a machine that is busy takes it off its core for milliseconds.
    """
    scheduler = Scheduler(settings(load.slots, load.pages))
    for request in requests(load):
        scheduler.add(request)
    times: list[float] = []
    for number in range(steps + load.slots):
        begun = time.thread_time()
        scheduled = scheduler.plan()
        if number >= load.slots:
            times.append(time.thread_time() - begun)
        if scheduled is None:
            break
        for row, sequence in zip(scheduled.plan.rows, scheduled.sequences, strict=True):
            if row.sample:
                scheduler.append(sequence, 1000 + row.start % 20_000)
                if sequence.output_tokens >= sequence.max_new_tokens:
                    scheduler.remove(sequence)
    times.sort()
    return times[len(times) // 2], times[-1]


def whole_core(load: Load, steps: int, tokenizer: Tokenizer) -> float:
    """Median seconds of `step` over some steps."""

    def no_grammars() -> None:
        raise AssertionError("no request here has a grammar")

    constraints = Constraints(no_grammars)  # type: ignore[arg-type]
    core = EngineCore(settings(load.slots, load.pages), Parrot(), tokenizer, constraints)
    core.step(requests(load))
    times: list[float] = []
    for number in range(steps + load.slots):
        if not core.busy:
            break
        begun = time.thread_time()
        core.step()
        if number >= load.slots:
            times.append(time.thread_time() - begun)
    constraints.close()
    times.sort()
    return times[len(times) // 2]


def main() -> None:
    """Print a line for each load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    tokenizer = Tokenizer.load(resolve_model("smollm2-135m-instruct").path)
    gc.disable()
    print("| load | plan µs | worst plan µs | step µs |\n|---|---|---|---|")
    for load in LOADS:
        usual, worst = scheduler_alone(load, steps)
        step = whole_core(load, steps, tokenizer)
        print(f"| {load.name} | {usual * 1e6:,.0f} | {worst * 1e6:,.0f} | {step * 1e6:,.0f} |")


if __name__ == "__main__":
    main()
