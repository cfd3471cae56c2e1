"""What tests of the books need: settings without a model, and a memory that holds tokens."""

from __future__ import annotations

from dataclasses import replace

from asyncsgl_engine.config import ModelFacts, ResolvedConfig
from asyncsgl_engine.draft import Scheduled
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.scheduler import Scheduler
from asyncsgl_engine.sequence import Sequence

__all__ = ["Cell", "Driver", "Memory", "request", "resolved", "whose"]

Cell = tuple[str | None, int, int] | None


def resolved(
    page_size: int,
    num_pages: int,
    chunk: int,
    slots: int,
    shares: bool = True,
    context: int = 4096,
    vocab: int = 300,
) -> ResolvedConfig:
    """Settings with the sizes that matter to the books."""
    return ResolvedConfig(
        model_path="none",
        model=ModelFacts("None", 1, 1, 1, 8, vocab, context, "float32"),
        device="cpu",
        dtype="float32",
        page_size=page_size,
        num_pages=num_pages,
        kv_bytes=0,
        max_total_tokens=page_size * num_pages,
        max_running_requests=slots,
        chunked_prefill_size=chunk,
        context_length=context,
        max_queued_requests=1000,
        radix_cache=shares,
        random_seed=0,
        debug_check=True,
        num_threads=2,
        native=False,
    )


def request(name: str, tokens: list[int], new: int = 4, **fields: object) -> Request:
    """A request for so many new tokens."""
    made = Request(name, tuple(tokens), Sampling(max_new_tokens=new))
    return replace(made, **fields)  # type: ignore[arg-type]


class Memory:
    """A KV cache that stores (whose, position, token) instead of keys and values.

    Whose: the salt that a token may be shared under, or the one request it must stay with.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self.size = config.page_size
        self.cells: list[Cell] = [None] * (config.num_pages * config.page_size)
        self.tables: dict[int, list[int]] = {}

    def run(self, scheduled: Scheduled) -> None:
        """Do a step as a runner does, then check what every row would attend to."""
        for copy in scheduled.plan.copies:
            source, target = copy.source * self.size, copy.target * self.size
            self.cells[target : target + copy.tokens] = self.cells[source : source + copy.tokens]
        pairs = list(zip(scheduled.plan.rows, scheduled.sequences, strict=True))
        for row, sequence in pairs:
            table = self.tables.setdefault(row.slot, [])
            table[row.fresh_from :] = row.pages[row.fresh_from :]
            for offset, token in enumerate(row.tokens):
                position = row.start + offset
                self.cells[self.place(row.slot, position)] = (
                    whose(sequence.request),
                    position,
                    token,
                )
        for row, sequence in pairs:
            end = row.start + len(row.tokens)
            assert self.tables[row.slot] == list(sequence.pages)
            seen = [self.cells[self.place(row.slot, position)] for position in range(end)]
            assert seen == [
                (whose(sequence.request), position, token)
                for position, token in enumerate(sequence.tokens[:end])
            ]

    def place(self, slot: int, position: int) -> int:
        """The cell of a slot's position."""
        return self.tables[slot][position // self.size] * self.size + position % self.size


def whose(asked: Request) -> str | None:
    """Under which name a request's tokens may be shared."""
    return f"only {asked.request_id}" if asked.no_cache else asked.cache_salt


class Driver:
    """Plays the core: draws tokens, ends sequences, keeps count of what is due."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.memory = Memory(config)
        self.alive: dict[str, Sequence] = {}
        self.done: dict[str, Sequence] = {}
        self.scored: dict[str, list[int]] = {}
        self.computed = 0

    def add(self, request: Request) -> Sequence:
        """Hand a request over."""
        sequence = self.scheduler.add(request)
        self.alive[request.request_id] = sequence
        return sequence

    def drop(self, name: str) -> None:
        """Cancel a request."""
        self.scheduler.remove(self.alive.pop(name))
        self.scored.pop(name, None)

    def step(self, only: Sequence | None = None, forced: int = 0) -> Scheduled | None:
        """Plan and run one step.

        Args:
            only: plan for this sequence alone.
            forced: tokens that a grammar adds to each that is drawn.
        """
        scheduled = self.scheduler.plan((only,) if only is not None else ())
        self.scheduler.check()
        if scheduled is None:
            return None
        plan = scheduled.plan
        assert plan.num_tokens <= self.config.chunked_prefill_size
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        assert self.scheduler.running <= self.config.max_running_requests
        self.computed += plan.num_tokens
        self.memory.run(scheduled)
        for row, sequence in zip(plan.rows, scheduled.sequences, strict=True):
            name = sequence.request.request_id
            self.scored.setdefault(name, []).extend(row.targets)
            if row.sample:
                for _ in range(min(1 + forced, sequence.max_new_tokens - sequence.output_tokens)):
                    # The same history always draws the same token, so that prefixes recur.
                    self.scheduler.append(sequence, (sum(sequence.tokens) * 7 + 1) % 5)
            whole = sequence.computed >= sequence.prompt_tokens
            if whole and sequence.output_tokens >= sequence.max_new_tokens:
                self.scheduler.remove(self.alive.pop(name))
                self.done[name] = sequence
        self.scheduler.check()
        return scheduled

    def drain(self) -> None:
        """Run until nothing is left."""
        for _ in range(10_000):
            if self.step() is None:
                break
        assert not self.alive
        assert self.scheduler.pool.held == 0
