"""The workloads A to E as token ids: what every contestant is given, and nothing else.

Lengths depend on the workload alone, ids on the repetition too: each repetition is the same
amount of work, and no prefix cache is warm from the one before. Only the standard library is
used, because this runs in the environments of the peers as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["TITLES", "WARM_UP", "Ask", "Workload", "build"]

TITLES = {
    "A": "batch: 64 at once, prompts 32 to 256, answers 32 to 128",
    "B": "shared prefix: 64 at once, 1024 common + 32 own, answers 32",
    "C": "single stream: 1, prompt 64, answer 128",
    "D": "fork: a prompt of 512, then 16 at once with 8 more, answers 64",
    "E": "long prompts: 4 at once, 4096, answers 32",
}
WARM_UP = 1_000_000  # the number of a repetition that is not measured
_LEAST = 1000  # ids below and the last hundred are often special tokens
_LAST = 100


@dataclass(frozen=True)
class Ask:
    """One request.

    Args:
        prompt: token ids.
        output: exact number of tokens to make.
    """

    prompt: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Workload:
    """Stages of requests; those of a stage are handed over together when the last has ended.

    Args:
        name: its letter.
        primer: a stage before, whose time counts and whose tokens do not.
        asks: the requests whose tokens count.
        shared: tokens with which all of their prompts begin.
    """

    name: str
    primer: tuple[Ask, ...]
    asks: tuple[Ask, ...]
    shared: int = 0

    @property
    def stages(self) -> Iterator[tuple[Ask, ...]]:
        """The stages in order, the empty ones left out."""
        return (stage for stage in (self.primer, self.asks) if stage)

    @property
    def output_tokens(self) -> int:
        return sum(ask.output for ask in self.asks)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(ask.prompt) for ask in self.asks)

    @property
    def distinct_prompt_tokens(self) -> int:
        """Prompt tokens that have to be computed if no prefix is computed twice."""
        return self.prompt_tokens - self.shared * (len(self.asks) - 1)


def build(name: str, repetition: int, vocab_size: int = 49152) -> Workload:
    """The workload of a letter.

    Args:
        name: A to E.
        repetition: chooses the token ids.
        vocab_size: ids are below it.

    Raises:
        ValueError: there is no such workload.
    """
    lengths = random.Random(f"lengths/{name}/0")
    ids = random.Random(f"ids of {name} {repetition}")

    def draw(count: int) -> tuple[int, ...]:
        return tuple(ids.randrange(_LEAST, vocab_size - _LAST) for _ in range(count))

    primer: tuple[Ask, ...] = ()
    common: tuple[int, ...] = ()
    match name:
        case "A":
            sizes = [(lengths.randint(32, 256), lengths.randint(32, 128)) for _ in range(64)]
            asks = tuple(Ask(draw(prompt), output) for prompt, output in sizes)
        case "B":
            common = draw(1024)
            asks = tuple(Ask(common + draw(32), 32) for _ in range(64))
        case "C":
            asks = (Ask(draw(64), 128),)
        case "D":
            common = draw(512)
            primer = (Ask(common, 1),)
            asks = tuple(Ask(common + draw(8), 64) for _ in range(16))
        case "E":
            asks = tuple(Ask(draw(4096), 32) for _ in range(4))
        case _:
            raise ValueError(f"there is no workload {name!r}: choose from {', '.join(TITLES)}")
    return Workload(name, primer, asks, len(common))
