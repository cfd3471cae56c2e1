"""Any history of arrivals, steps, cancels, failures and flushes leaves the books right.

The model is `tests.engine.books.Memory`: it stores tokens where a runner stores keys and values,
so a row that would attend to a wrong page, to a page of another salt, or to one that is not
computed yet is seen at once; and the driver counts for itself what is due to whom.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncsgl_engine.errors import PromptTooLong
from tests.engine.books import Driver, request, resolved

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=40)
actions = st.one_of(
    st.tuples(st.just("add"), tokens, st.integers(0, 12), st.integers(0, 15), st.integers(-9, 20)),
    st.tuples(st.just("step"), st.integers(1, 4), st.integers(0, 3)),
    st.tuples(st.just("drop"), st.integers(0, 100)),
    st.tuples(st.just("fail"), st.booleans()),
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
def test_every_row_attends_to_its_own_tokens_and_everything_ends(
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
    due: dict[str, int] = {}
    scores: dict[str, list[int]] = {}
    for number, action in enumerate(script):
        match action:
            case ("add", list() as prompt, int(new), int(kind), int(scored_from)):
                name = f"r{number}"
                start = min(scored_from, len(prompt) - 1) if scored_from >= 0 else -1
                asked = request(
                    name,
                    prompt,
                    new,
                    priority=kind & 1,
                    cache_salt="other" if kind & 2 else None,
                    no_cache=kind & 12 == 12,
                    return_logprob=start >= 0,
                    logprob_start_len=start,
                )
                try:
                    driver.add(asked)
                except PromptTooLong:
                    assert len(prompt) + (new > 0) > config.sequence_limit
                else:
                    due[name] = min(new, config.sequence_limit - len(prompt))
                    scores[name] = prompt[max(start, 1) :] if start >= 0 else []
            case ("step", int(times), int(forced)):
                for _ in range(times):
                    driver.step(forced=forced)
            case ("drop", int(which)):
                if driver.alive:
                    name = sorted(driver.alive)[which % len(driver.alive)]
                    driver.drop(name)
                    del due[name], scores[name]
                    driver.scheduler.check()
            case ("fail", bool(alone)):
                fail(driver, alone)
            case _:
                assert driver.scheduler.clear_cache() == (driver.scheduler.running == 0)
                driver.scheduler.check()
    driver.drain()
    assert {name: seq.output_tokens for name, seq in driver.done.items()} == due
    assert {name: driver.scored[name] for name in due} == scores
    assert driver.scheduler.clear_cache()
    assert driver.scheduler.pool.free == pages


def fail(driver: Driver, alone: bool) -> None:
    """A step that was planned comes to nothing; then some of its sequences run alone."""
    scheduled = driver.scheduler.plan()
    if scheduled is None:
        return
    driver.scheduler.retreat(scheduled)
    driver.scheduler.check()
    assert driver.scheduler.running == 0
    assert driver.scheduler.pool.free == driver.config.num_pages
    for sequence in scheduled.sequences if alone else ():
        if sequence.request.request_id in driver.alive:
            step = driver.step(only=sequence)
            assert step is not None
            assert step.sequences == (sequence,)


@given(
    hits=st.lists(st.booleans(), min_size=40, max_size=120),
    slots=st.integers(1, 4),
    chunk=st.sampled_from([8, 64]),
)
def test_nobody_is_overtaken_without_end(hits: list[bool], slots: int, chunk: int) -> None:
    driver = Driver(resolved(page_size=4, num_pages=400, chunk=chunk, slots=slots))
    driver.add(request("warm", [1] * 40, new=1))
    driver.drain()
    order = []
    for number, hit in enumerate(hits):
        prompt = [1] * 40 + [3, number] if hit else [2] * 30 + [4, number]
        order.append(driver.add(request(f"r{number}", prompt, new=1)).serial)
        if number % 3 == 0:
            driver.step()
    driver.drain()
    ended = [sequence.serial for sequence in driver.done.values() if sequence.serial in set(order)]
    for place, serial in enumerate(ended):
        assert sum(later > serial for later in ended[:place]) <= 16 + 2 * slots + 1
