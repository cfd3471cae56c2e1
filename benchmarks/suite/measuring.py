"""Runs a case on a side, and counts what any prefix cache could have saved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from asyncsgl.testing import RecordingBackend
from asyncsgl.types import Generation, GenRequest, Scores
from benchmarks.peers.cpu import ForeignCpu
from benchmarks.peers.sharing import Seen
from benchmarks.suite.programs import SCHEMA, Case
from benchmarks.suite.sides import Side

__all__ = ["Encode", "Outcome", "best_hit_rate", "run_case"]

Encode = Callable[[str], Sequence[int]]
Calls = Sequence[tuple[GenRequest, Generation | Scores | Exception]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of a case on a side gave.

    Args:
        side: its name.
        case: its name.
        wall_s: from the first row's start to the last one's end.
        rows: programs that ran at once.
        calls: generations and choices they asked for.
        output_tokens: made by the generations.
        prompt_tokens: as the side counts them.
        cached_tokens: those that it found in its cache.
        best_hit_rate: what a cache without limits finds, by the tokens that were sent.
        foreign_cpus: CPUs that others used meanwhile.
        texts: of the finished programs, in order.
    """

    side: str
    case: str
    wall_s: float
    rows: int
    calls: int
    output_tokens: int
    prompt_tokens: float
    cached_tokens: float
    best_hit_rate: float
    foreign_cpus: float | None
    texts: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it but the texts."""
        values = {name: value for name, value in asdict(self).items() if name != "texts"}
        return values | {"hit_rate": self.hit_rate}

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that the side found in its cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


async def run_case(case: Case, side: Side, scale: float, seed: str, encode: Encode) -> Outcome:
    """Run all rows of a case at once.

    Args:
        case: the program and its rows.
        side: where.
        scale: of the number of rows.
        seed: of their texts.
        encode: text to token ids, as the model's tokenizer does.
    """
    backend, names_schema = side.constrained if case.constrained else (side.backend, False)
    extra = {"schema": SCHEMA if names_schema else None} if case.constrained else {}
    recording = RecordingBackend(backend)
    rows = case.rows(scale, seed)
    await side.flush()
    prompts, cached = await side.prompt_and_cached()
    with ForeignCpu(side.pids) as watch:
        begun = time.perf_counter()
        states = await asyncio.gather(
            *(case.program.run(**row, **extra, backend=recording, **side.defaults) for row in rows)
        )
        wall = time.perf_counter() - begun
    prompts_now, cached_now = await side.prompt_and_cached()
    return Outcome(
        side.name,
        case.name,
        wall,
        len(rows),
        len(recording.calls),
        sum(state.usage.completion_tokens for state in states),
        prompts_now - prompts,
        cached_now - cached,
        best_hit_rate(recording.calls, encode),
        watch.cpus,
        tuple(state.text() for state in states),
    )


def best_hit_rate(calls: Calls, encode: Encode) -> float:
    """Share of the prompt tokens that a cache without limits would have found.

    Each call's prompt is looked up in a tree of all the prompts and answers of the calls that
    ended before. Answers are counted as they read in a later prompt, the last token with them,
    so no cache can do better. The last token of a prompt is always computed, because the next one follows
    from it; of a scored choice everything from the token before it on.
    """
    seen = Seen()
    prompt_tokens = cached = 0
    for request, result in calls:
        prompt = list(encode(request.text or ""))
        match result:
            case Generation():
                prompt_tokens += len(prompt)
                cached += min(seen.add(prompt), len(prompt) - 1)
                for completion in result.completions:
                    seen.add(encode((request.text or "") + completion.text))
            case Scores():
                for choice in result.choices:
                    whole = list(encode((request.text or "") + choice.text))
                    start = len(whole) - len(choice.token_ids)
                    prompt_tokens += len(whole)
                    cached += max(0, min(seen.add(whole), start - 1))
            case Exception():
                raise result
    return cached / prompt_tokens if prompt_tokens else 0.0
