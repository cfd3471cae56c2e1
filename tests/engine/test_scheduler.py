"""The books of sequences and pages, against a memory that really holds tokens.

Random histories are in `tests/property/test_books.py`.
"""

from __future__ import annotations

import sys

import pytest

from asyncsgl_engine.errors import PromptTooLong
from asyncsgl_engine.scheduler import Scheduler
from tests.engine.books import Driver, request, resolved


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


def test_several_answers_to_one_prompt_compute_it_once_and_copy_its_last_page() -> None:
    driver = Driver(resolved(page_size=16, num_pages=200, chunk=512, slots=16))
    prompt = [index % 7 for index in range(16 * 5 + 13)]
    for number in range(8):
        driver.add(request(f"r{number}", prompt, new=3))
    first, second = driver.step(), driver.step()
    assert first is not None
    assert second is not None
    # The page that the first one fills only in part is there one step later.
    assert [len(row.tokens) for row in first.plan.rows] == [93]
    assert [copy.tokens for copy in second.plan.copies] == [12] * 7
    assert [len(row.tokens) for row in second.plan.rows] == [1] * 8
    driver.drain()
    assert {seq.cached_tokens for seq in driver.done.values()} == {0, 92}


def test_few_tokens_are_computed_again_rather_than_waited_for() -> None:
    driver = Driver(resolved(page_size=16, num_pages=200, chunk=512, slots=16))
    for number in range(3):
        driver.add(request(f"r{number}", [1] * 24, new=1))
    scheduled = driver.step()
    assert scheduled is not None
    assert [len(row.tokens) for row in scheduled.plan.rows] == [24, 8, 8]


def test_forks_go_on_from_the_half_page_that_the_answer_before_them_ended_in() -> None:
    driver = Driver(resolved(page_size=64, num_pages=40, chunk=512, slots=16))
    trunk = driver.add(request("trunk", [index % 9 for index in range(100)], new=20))
    driver.drain()
    before = driver.computed
    for number in range(4):
        driver.add(request(f"fork{number}", [*trunk.tokens, 11, number], new=1))
    driver.drain()
    # The last drawn token was never computed; everything before it was.
    assert [driver.done[f"fork{n}"].cached_tokens for n in range(4)] == [119] * 4
    assert driver.computed - before == 4 * 3


def test_a_shared_prefix_longer_than_many_chunks_is_computed_once() -> None:
    driver = Driver(resolved(page_size=16, num_pages=400, chunk=40, slots=8))
    prefix = [index % 11 for index in range(1600)]
    for number in range(6):
        driver.add(request(f"r{number}", [*prefix, 20 + number], new=2))
        driver.step()
    driver.drain()
    assert driver.computed == 1600 + 6 * 2


def test_a_request_that_opts_out_neither_reads_nor_fills_the_cache() -> None:
    driver = Driver(resolved(page_size=4, num_pages=50, chunk=64, slots=2))
    for number, opts_out in enumerate([True, False, True]):
        driver.add(request(f"r{number}", [1] * 17, new=2, no_cache=opts_out))
        driver.drain()
    assert [seq.cached_tokens for seq in driver.done.values()] == [0, 0, 0]
    assert driver.scheduler.pool.cached == 4


def test_a_prompt_in_progress_can_be_joined_before_it_is_done() -> None:
    driver = Driver(resolved(page_size=4, num_pages=100, chunk=16, slots=4))
    driver.add(request("long", [1] * 80, new=1))
    driver.step()
    driver.step()
    driver.drop("long")
    assert driver.add(request("next", [1] * 40, new=1)).cached_tokens == -1
    driver.drain()
    assert driver.done["next"].cached_tokens == 32


def test_a_failed_step_leaves_everybody_waiting_with_what_they_have() -> None:
    driver = Driver(resolved(page_size=4, num_pages=100, chunk=64, slots=4))
    for number in range(3):
        driver.add(request(f"r{number}", [number] * 9, new=5))
    driver.step()
    driver.step()
    scheduled = driver.scheduler.plan()
    assert scheduled is not None
    driver.scheduler.retreat(scheduled)
    assert (driver.scheduler.running, driver.scheduler.waiting) == (0, 3)
    alone = driver.step(only=scheduled.sequences[1])
    assert alone is not None
    assert [len(row.tokens) for row in alone.plan.rows] == [11]
    driver.drain()
    assert {seq.output_tokens for seq in driver.done.values()} == {5}


def calls_to_plan(waiting: int) -> int:
    """Function calls in three plans with so many requests in the queue."""
    driver = Driver(resolved(page_size=4, num_pages=4000, chunk=64, slots=8))
    for number in range(waiting):
        driver.scheduler.add(request(f"r{number}", [number % 250, number // 250, 1], new=30))
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(3):
            driver.scheduler.plan()
    finally:
        sys.setprofile(None)
    return calls


def test_planning_does_not_grow_with_the_queue() -> None:
    assert calls_to_plan(20_000) < 1.3 * calls_to_plan(200)
