"""What constraints cost and what they save: the same batch with and without a JSON schema.

    python benchmarks/constraints.py [--model PATH] [--rows 32] [--dtype bfloat16] [--runs 5] [--json FILE]

All rows run at once, greedily, on the local engine. Each schema is measured beside the same number
of tokens without one, by turns in one run:

- `free text`: one string that is longer than the answer may be, so that all rows run to the same
  length. Nearly every token is allowed and nothing is forced: what differs is what masks cost, in
  milliseconds a step against milliseconds a step.
- `records`: objects with long keys, as services return them. Most tokens are forced, and a run of
  them takes one step: output tokens a second against output tokens a second.
- `compile`: tokens that a running request gets while another's large grammar is compiled, against
  those it gets in the same time alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import count, islice, pairwise, product
from pathlib import Path
from string import ascii_lowercase

from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.request import Completion, Grammar, Request, Sampling

TEXT = {"type": "string", "minLength": 4000, "maxLength": 5000}
RECORDS = {
    "type": "array",
    "minItems": 4,
    "maxItems": 4,
    "items": {
        "type": "object",
        "properties": {
            "customer_identifier": {"type": "integer", "minimum": 0, "maximum": 99},
            "subscription_status": {"enum": ["active", "cancelled"]},
            "preferred_contact_method": {"enum": ["email", "telephone"]},
            "has_outstanding_invoices": {"type": "boolean"},
        },
        "required": [
            "customer_identifier",
            "subscription_status",
            "preferred_contact_method",
            "has_outstanding_invoices",
        ],
        "additionalProperties": False,
    },
}
COLUMNS = ("ms a step, free", "ms a step", "ratio", "tokens/s, free", "tokens/s", "ratio")


@dataclass(frozen=True)
class Batch:
    """One run of all rows.

    Args:
        seconds: from the first request to the last answer.
        steps: forward passes.
        tokens: output tokens of all rows.
    """

    seconds: float
    steps: int
    tokens: int

    @property
    def step_ms(self) -> float:
        """Milliseconds of one step."""
        return self.seconds / self.steps * 1000

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Pair:
    """A schema's batch and the one without it."""

    name: str
    free: Batch
    bound: Batch

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        free, bound = self.free, self.bound
        steps = (free.step_ms, bound.step_ms, bound.step_ms / free.step_ms)
        rates = (free.rate, bound.rate, bound.rate / free.rate)
        return (
            *(f"{number:.2f}" for number in steps),
            *(f"{number:.0f}" for number in rates[:2]),
            f"{rates[2]:.2f}",
        )


class Rows:
    """Sends batches to an engine."""

    def __init__(self, engine: AsyncEngine, rows: int) -> None:
        self._engine = engine
        self._rows = rows
        self._numbers = count()

    async def run(self, grammar: Grammar | None, most: int) -> tuple[Batch, list[Completion]]:
        """One batch of answers, each to a prompt of its own.

        Args:
            grammar: of every row; None leaves them free and makes each `most` tokens long.
            most: tokens of one answer.
        """
        sampling = Sampling(max_new_tokens=most, temperature=0.0, ignore_eos=grammar is None)
        requests = [
            Request(f"b{next(self._numbers)}", self._prompt(row), sampling, grammar, no_cache=True)
            for row in range(self._rows)
        ]
        before, begun = self._engine.statistics(), time.perf_counter()
        answers = await asyncio.gather(*map(self._engine.generate, requests))
        seconds = time.perf_counter() - begun
        after = self._engine.statistics()
        tokens = sum(len(answer.token_ids) for answer in answers)
        return Batch(seconds, after.steps - before.steps, tokens), answers

    def _prompt(self, row: int) -> tuple[int, ...]:
        text = f"Write the records of customer {row} of the telephone company as JSON:\n"
        return tuple(self._engine.tokenizer.encode(text))


def typical(batches: list[Batch]) -> Batch:
    """The batch of the median rate."""
    return sorted(batches, key=lambda batch: batch.rate)[len(batches) // 2]


async def compared(rows: Rows, name: str, schema: object, most: int, runs: int) -> Pair:
    """A schema beside the same number of tokens without one, by turns."""
    grammar = Grammar("json_schema", json.dumps(schema))
    _, answers = await rows.run(grammar, most)  # compiled and warm
    usual = round(statistics.mean(len(answer.token_ids) for answer in answers))
    for answer in answers:
        if answer.finish.reason == "stop":
            json.loads(answer.text)
    bound: list[Batch] = []
    free: list[Batch] = []
    for _ in range(runs):
        bound.append((await rows.run(grammar, most))[0])
        free.append((await rows.run(None, usual))[0])
    return Pair(name, typical(free), typical(bound))


def large() -> Grammar:
    """Rules that refer to one another in a row, near the longest that is taken."""
    letters = (
        "x" + "".join(t) for size in range(1, 5) for t in product(ascii_lowercase, repeat=size)
    )
    names = list(islice(letters, 14_000))
    rules = [f'{one}:("a" {other})?' for one, other in pairwise(names)]
    return Grammar("ebnf", "\n".join([f"start:{names[0]}", *rules, f'{names[-1]}:"a"']))


async def beside_a_compiler(engine: AsyncEngine) -> tuple[float, float, float]:
    """Tokens a second of a running request alone and while a grammar compiles, and how long it does."""
    prompt = tuple(engine.tokenizer.encode("Once upon a time"))
    sampling = Sampling(max_new_tokens=4000, temperature=0.0, ignore_eos=True)
    long = Request("running", prompt, sampling, stream=True)
    stream = engine.stream(long)
    await anext(stream)
    begun, tokens = time.perf_counter(), 0
    while time.perf_counter() - begun < 2:
        tokens += len((await anext(stream)).token_ids)
    alone = tokens / (time.perf_counter() - begun)
    few = replace(sampling, max_new_tokens=1)
    begun, tokens = time.perf_counter(), 0
    waiting = asyncio.create_task(engine.generate(Request("compiled", prompt, few, large())))
    while not waiting.done():
        tokens += len((await anext(stream)).token_ids)
    seconds = time.perf_counter() - begun
    await stream.aclose()
    return alone, tokens / seconds, seconds


async def measure(arguments: argparse.Namespace) -> None:
    """Print the table and write the figures."""
    config = EngineConfig(
        arguments.model, dtype=arguments.dtype, max_running_requests=arguments.rows
    )
    async with AsyncEngine(config) as engine:
        rows = Rows(engine, arguments.rows)
        pairs = [
            await compared(rows, "free text", TEXT, 128, arguments.runs),
            await compared(rows, "records", RECORDS, 400, arguments.runs),
        ]
        alone, beside, seconds = await beside_a_compiler(engine)
    print(f"| {arguments.rows} rows, {arguments.dtype} | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for pair in pairs:
        print(f"| {pair.name} | {' | '.join(pair.cells())} |")
    print(
        f"\nwhile a grammar compiles ({seconds:.2f} s): {beside:.0f} tokens/s beside it, "
        f"{alone:.0f} alone, ratio {beside / alone:.2f}"
    )
    if arguments.json is not None:
        figures = {
            "rows": arguments.rows,
            "dtype": arguments.dtype,
            "pairs": [asdict(pair) for pair in pairs],
            "compile": {"alone": alone, "beside": beside, "seconds": seconds},
        }
        arguments.json.write_text(json.dumps(figures, indent=1))


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
