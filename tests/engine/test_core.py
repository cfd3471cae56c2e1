"""Steps without a model: a runner that answers from a rule."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from asyncsgl_engine.constraints import Constraints
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.errors import StepFailed
from asyncsgl_engine.plan import Mask, Outcome, Plan, Seat
from asyncsgl_engine.request import Delta, Request, Sampling
from asyncsgl_engine.tokenizer import Tokenizer
from tests.engine.books import resolved
from tests.engine.conftest import byte_tokenizer


class CountingPass:
    """Knows the answer without computing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def draw(self, mask: Mask | None, forced: Mapping[int, int]) -> None:
        """Nothing is drawn."""

    def outcome(self) -> Outcome:
        return Outcome([row.tokens[-1] + 1 if row.sample else -1 for row in self.plan.rows])


class CountingRunner:
    """After token n comes n + 1; raises as often as it is told to."""

    def __init__(self) -> None:
        self.faults = 0

    def seat(self, seat: Seat) -> None:
        """Nothing to keep."""

    def launch(self, plan: Plan) -> CountingPass:
        if self.faults:
            self.faults -= 1
            raise MemoryError("no room")
        return CountingPass(plan)


def core_with(runner: CountingRunner, slots: int = 2) -> EngineCore:
    def no_grammars() -> None:
        raise AssertionError("no request here has a grammar")

    config = resolved(page_size=4, num_pages=50, chunk=64, slots=slots)
    constraints = Constraints(no_grammars)  # type: ignore[arg-type]
    return EngineCore(config, runner, Tokenizer(byte_tokenizer()), constraints)


def request(name: str, first: int = 65, stream: bool = False) -> Request:
    return Request(name, (first,), Sampling(max_new_tokens=5), stream=stream)


def drain(core: EngineCore) -> list[Delta]:
    deltas: list[Delta] = []
    while core.busy:
        deltas += core.step()
    return deltas


def test_unstreamed_requests_get_one_delta_and_streamed_ones_one_a_step() -> None:
    core = core_with(CountingRunner())
    deltas = core.step([request("whole"), request("pieces", stream=True)]) + drain(core)
    assert [delta.request_id for delta in deltas].count("whole") == 1
    pieces = [delta for delta in deltas if delta.request_id == "pieces"]
    assert [delta.token_ids for delta in pieces] == [(token,) for token in range(66, 71)]
    assert sum(delta.finish is not None for delta in deltas) == 2


def test_a_pass_that_fails_once_is_repeated_and_ends_nothing() -> None:
    runner = CountingRunner()
    core = core_with(runner)
    core.step([request("one"), request("two")])
    runner.faults = 1
    assert core.step([request("three")]) == []
    assert {delta.token_ids for delta in drain(core)} == {(66, 67, 68, 69, 70)}
    assert (core.statistics().failed, core.statistics().finished) == (0, 3)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_where_everything_fails_everything_ends(count: int) -> None:
    runner = CountingRunner()
    core = core_with(runner, slots=4)
    runner.faults = 10**6
    failed = core.step([request(f"r{number}") for number in range(count)]) + drain(core)
    assert {delta.request_id for delta in failed} == {f"r{number}" for number in range(count)}
    for delta in failed:
        assert isinstance(delta.error, StepFailed)
        assert repr(delta.request_id) in str(delta.error)
        assert isinstance(delta.error.__cause__, MemoryError)
    assert 10**6 - runner.faults <= 2 * count
    assert core.statistics().pages_free == core.statistics().pages_total
    runner.faults = 0
    (last,) = core.step([request("after")]) + drain(core)
    assert last.token_ids == (66, 67, 68, 69, 70)


def test_cancelled_ids_may_come_back_in_the_same_step() -> None:
    core = core_with(CountingRunner())
    core.step([request("r")])
    deltas = core.step([request("r", first=80)], ["r", "unknown"])
    assert [delta.finish and delta.finish.reason for delta in deltas] == ["abort"]
    (last,) = drain(core)
    assert last.token_ids == (81, 82, 83, 84, 85)
