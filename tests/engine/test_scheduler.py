"""The books of sequences and pages, against a memory that really holds tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsgl_engine.config import ResolvedConfig
from asyncsgl_engine.errors import PromptTooLong
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.scheduler import Scheduled, Scheduler
from asyncsgl_engine.sequence import Sequence
from tests.engine.books import resolved

Cell = tuple[int, int] | None


class Memory:
    """A KV cache that stores (position, token) instead of keys and values."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.size = config.page_size
        self.cells: list[Cell] = [None] * (config.num_pages * config.page_size)
        self.tables: dict[int, list[int]] = {}

    def run(self, scheduled: Scheduled) -> None:
        """Do a step as a runner does, then check what every row would attend to."""
        for copy in scheduled.plan.copies:
            source, target = copy.source * self.size, copy.target * self.size
            self.cells[target : target + copy.tokens] = self.cells[source : source + copy.tokens]
        for row in scheduled.plan.rows:
            table = self.tables.setdefault(row.slot, [])
            table[row.fresh_from :] = row.pages[row.fresh_from :]
            for offset, token in enumerate(row.tokens):
                position = row.start + offset
                self.cells[self.place(row.slot, position)] = (position, token)
        for row, sequence in zip(scheduled.plan.rows, scheduled.sequences, strict=True):
            end = row.start + len(row.tokens)
            assert self.tables[row.slot] == list(sequence.pages)
            seen = [self.cells[self.place(row.slot, position)] for position in range(end)]
            assert seen == list(enumerate(sequence.tokens[:end]))

    def place(self, slot: int, position: int) -> int:
        return self.tables[slot][position // self.size] * self.size + position % self.size


class Driver:
    """Plays the core: draws tokens, ends sequences, keeps count of what is due."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.memory = Memory(config)
        self.alive: dict[str, Sequence] = {}
        self.done: dict[str, Sequence] = {}
        self.computed = 0

    def add(self, request: Request) -> Sequence:
        sequence = self.scheduler.add(request)
        self.alive[request.request_id] = sequence
        return sequence

    def drop(self, name: str) -> None:
        self.scheduler.remove(self.alive.pop(name))

    def step(self) -> Scheduled | None:
        scheduled = self.scheduler.plan()
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
            if row.sample:
                # The same history always draws the same token, so that prefixes recur.
                self.scheduler.append(sequence, (sum(sequence.tokens) * 7 + 1) % 5)
            over = sequence.output_tokens >= sequence.max_new_tokens
            if over and not sequence.pending - int(row.sample):
                name = sequence.request.request_id
                self.scheduler.remove(self.alive.pop(name))
                self.done[name] = sequence
        self.scheduler.check()
        return scheduled

    def drain(self) -> None:
        for _ in range(10_000):
            if self.step() is None:
                break
        assert not self.alive
        assert self.scheduler.pool.held == 0


def request(name: str, tokens: list[int], new: int = 4, **fields: object) -> Request:
    made = Request(name, tuple(tokens), Sampling(max_new_tokens=new))
    return replace(made, **fields)  # type: ignore[arg-type]


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=40)
actions = st.one_of(
    st.tuples(st.just("add"), tokens, st.integers(0, 12), st.integers(0, 7)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("drop"), st.integers(0, 100)),
    st.tuples(st.just("flush")),
)


@given(
    script=st.lists(actions, max_size=40),
    page_size=st.sampled_from([1, 2, 4, 16]),
    pages=st.integers(4, 40),
    chunk=st.sampled_from([1, 3, 8, 64]),
    slots=st.integers(1, 6),
    shares=st.booleans(),
)
def test_every_row_attends_to_its_own_tokens(
    script: list[tuple[object, ...]],
    page_size: int,
    pages: int,
    chunk: int,
    slots: int,
    shares: bool,
) -> None:
    config = resolved(
        page_size=page_size, num_pages=pages, chunk=chunk, slots=slots, shares=shares, context=64
    )
    driver = Driver(config)
    added: dict[str, int] = {}
    for number, action in enumerate(script):
        match action:
            case ("add", list() as prompt, int(new), int(kind)):
                name = f"r{number}"
                asked = request(
                    name,
                    prompt,
                    new,
                    priority=kind & 1,
                    cache_salt="other" if kind & 2 else None,
                    no_cache=kind == 7,
                )
                try:
                    driver.add(asked)
                except PromptTooLong:
                    assert len(prompt) + (new > 0) > config.sequence_limit
                else:
                    added[name] = min(new, config.sequence_limit - len(prompt))
            case ("step", int(times)):
                for _ in range(times):
                    driver.step()
            case ("drop", int(which)):
                if driver.alive:
                    name = sorted(driver.alive)[which % len(driver.alive)]
                    driver.drop(name)
                    del added[name]
                    driver.scheduler.check()
            case _:
                assert driver.scheduler.clear_cache() == (driver.scheduler.running == 0)
    driver.drain()
    assert {name: seq.output_tokens for name, seq in driver.done.items()} == added
    assert driver.scheduler.clear_cache()
    assert driver.scheduler.pool.free == pages


def test_a_prefix_shared_by_new_requests_is_computed_once() -> None:
    driver = Driver(resolved(page_size=16, num_pages=400, chunk=256, slots=64))
    prefix = [index % 7 for index in range(512)]
    for number in range(32):
        driver.add(request(f"r{number}", [*prefix, 20 + number, number], new=1))
    driver.drain()
    assert driver.computed == 512 + 32 * 2


def test_followers_join_the_step_that_computes_their_prefix() -> None:
    driver = Driver(resolved(page_size=4, num_pages=100, chunk=64, slots=8))
    for number in range(3):
        driver.add(request(f"r{number}", [1] * 32 + [2 + number], new=1))
    scheduled = driver.step()
    assert scheduled is not None
    assert sorted(len(row.tokens) for row in scheduled.plan.rows) == [1, 1, 33]


def test_part_of_a_page_is_copied() -> None:
    driver = Driver(resolved(page_size=16, num_pages=10, chunk=64, slots=4))
    driver.add(request("first", [1] * 16, new=1))
    driver.drain()
    driver.add(request("second", [1] * 10 + [2] * 3, new=1))
    scheduled = driver.step()
    assert scheduled is not None
    assert [copy.tokens for copy in scheduled.plan.copies] == [10]
    assert scheduled.plan.num_tokens == 3


def test_decoding_goes_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    driver = Driver(resolved(page_size=4, num_pages=100, chunk=16, slots=4))
    driver.add(request("short", [1, 2], new=20))
    driver.step()
    driver.add(request("long", [3] * 100, new=1))
    for _ in range(6):
        scheduled = driver.step()
        assert scheduled is not None
        assert [len(row.tokens) for row in scheduled.plan.rows] == [1, 15]


def test_running_out_of_pages_preempts_the_weakest_and_loses_nothing() -> None:
    driver = Driver(resolved(page_size=2, num_pages=12, chunk=64, slots=8))
    for number in range(4):
        driver.add(request(f"r{number}", [number] * 3, new=14))
    driver.drain()
    assert driver.scheduler.preemptions > 0
    assert {seq.output_tokens for seq in driver.done.values()} == {14}
    assert next(iter(driver.done)) == "r0"


def test_higher_priority_runs_first() -> None:
    driver = Driver(resolved(page_size=4, num_pages=50, chunk=64, slots=1))
    for number, priority in enumerate([0, 5, 1]):
        driver.add(request(f"r{number}", [number] * 3, new=2, priority=priority))
    driver.drain()
    assert list(driver.done) == ["r1", "r2", "r0"]


def test_a_cached_prefix_is_preferred_but_nobody_starves() -> None:
    driver = Driver(resolved(page_size=4, num_pages=400, chunk=64, slots=1))
    driver.add(request("warm", [1] * 40, new=1))
    driver.drain()
    driver.add(request("cold", [2] * 40, new=1))
    for number in range(60):
        driver.add(request(f"hot{number}", [1] * 40 + [3, number], new=1))
    driver.drain()
    place = list(driver.done).index("cold")
    assert 1 < place < 40


def test_different_salts_share_nothing() -> None:
    driver = Driver(resolved(page_size=4, num_pages=50, chunk=64, slots=2))
    for number, salt in enumerate(["a", "b", "a"]):
        driver.add(request(f"r{number}", [1] * 17, new=1, cache_salt=salt))
        driver.drain()
    assert [seq.cached_tokens for seq in driver.done.values()] == [0, 0, 16]


def test_a_prompt_too_long_is_refused_with_both_lengths() -> None:
    scheduler = Scheduler(resolved(page_size=4, num_pages=4, chunk=64, slots=2))
    with pytest.raises(PromptTooLong, match=r"16 tokens, at most 15 fit \(max_total_tokens\)"):
        scheduler.add(request("r", [1] * 16))
    assert scheduler.add(request("r", [1] * 16, new=0)).limit == 16
