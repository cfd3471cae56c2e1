"""Runs the same workloads on several engines by turns, each loaded in its own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.contestant import Failure, Process, Team, started
from benchmarks.peers.cpu import ForeignCpu, wait_for_quiet
from benchmarks.peers.result import Result
from benchmarks.peers.workloads import WARM_UP, Workload, build

__all__ = ["Plan", "contest"]


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Args:
        workloads: their letters, in order.
        runs: measured runs of each.
        threads: cores for each contestant.
        budget_s: no further run of one workload begins that would not fit in that.
        quiet_s: how long to wait before each run for other processes to leave the cores.
        most_foreign: CPUs that others may use before a run counts as disturbed.
        warm_up: the letter of the workload to warm up with; empty for the measured one.
    """

    workloads: str
    runs: int
    threads: int
    budget_s: float
    quiet_s: float
    most_foreign: float
    warm_up: str = ""


def contest(
    teams: Sequence[Team],
    dtype: str,
    plan: Plan,
    logs: Path,
    note: Callable[[str], None],
    profile: bool = False,
) -> Iterator[Result]:
    """Measure all teams, by turns, one workload after the other.

    Args:
        teams: who takes part; all stay loaded, idle while others run.
        dtype: of weights and cache.
        plan: what to measure and how.
        logs: folder for what the contestants print.
        note: told of each run.
        profile: have one more run, at the end, which tells its phases.
    """
    with ExitStack() as stack:
        workers: list[tuple[Process, str]] = []
        for team in teams:
            worker, said = stack.enter_context(started(team, dtype, plan.threads, logs))
            if worker is None:
                note(f"{team.name} {dtype}: {said}")
                for name in plan.workloads:
                    yield Result(team.name, "", dtype, name, error=said)
            else:
                note(f"{team.name} {said} {dtype}: loaded")
                workers.append((worker, said))
        for name in plan.workloads:
            match = _Match(workers, dtype, name, plan, note)
            yield from match.play(profile)


class _Match:
    """One workload on all workers."""

    def __init__(
        self,
        workers: Sequence[tuple[Process, str]],
        dtype: str,
        workload: str,
        plan: Plan,
        note: Callable[[str], None],
    ) -> None:
        self._plan, self._note, self._workload = plan, note, workload
        self._pids = [worker.pid for worker, _ in workers]
        self._sides = [
            (worker, Result(worker.team.name, version, dtype, workload))
            for worker, version in workers
        ]

    def play(self, profile: bool) -> list[Result]:
        for worker, result in self._sides:
            self._warm_up(worker, result)
        for repetition in range(self._plan.runs):
            # who begins changes, so that nobody always runs after the same other
            first = repetition % max(1, len(self._sides))
            for worker, result in self._sides[first:] + self._sides[:first]:
                if result.error is None and self._fits(result):
                    self._try(worker, result, repetition)
        if profile:
            for worker, result in self._sides:
                if result.error is None:
                    result.phases = worker.run(self._workload, self._plan.runs, True)["phases"]
        results = [result for _, result in self._sides]
        for result in results:
            pairs = zip(results[0].outputs, result.outputs, strict=False)
            if results[0].outputs and result.outputs:
                result.same = sum(mine == other for mine, other in pairs)
        return results

    def _fits(self, result: Result) -> bool:
        spent = sum(result.walls_s)
        return not result.walls_s or spent + spent / len(result.walls_s) <= self._plan.budget_s

    def _said(self, result: Result) -> str:
        return f"{result.team} {result.dtype} {self._workload}"

    def _warm_up(self, worker: Process, result: Result) -> None:
        try:
            run = worker.run(self._plan.warm_up or self._workload, WARM_UP)
        except Failure as failure:
            self._fail(result, failure)
        else:
            self._note(f"{self._said(result)}: warm-up {run['wall_s']:.2f} s")

    def _fail(self, result: Result, failure: Failure) -> None:
        result.error = str(failure)
        self._note(f"{self._said(result)}: {failure}")

    def _try(self, worker: Process, result: Result, repetition: int) -> None:
        workload = build(self._workload, repetition)
        try:
            wait_for_quiet(self._plan.quiet_s, self._pids, self._plan.most_foreign)
            with ForeignCpu(self._pids) as watch:
                run = worker.run(self._workload, repetition)
            _check(workload, run["outputs"])
        except Failure as failure:
            self._fail(result, failure)
            return
        said = f"{run['wall_s']:.2f} s, others {watch.cpus or 0.0:.2f} CPUs"
        self._note(f"{self._said(result)}: {said}")
        result.walls_s.append(run["wall_s"])
        result.foreign_cpus.append(watch.cpus)
        result.output_tokens, result.requests = workload.output_tokens, len(workload.asks)
        if run["ttft_s"] is not None:
            result.ttft_s.append(run["ttft_s"])
        if repetition == 0:
            result.outputs = run["outputs"]


def _check(workload: Workload, outputs: list[list[int]]) -> None:
    """Every request has to have made as many tokens as asked for."""
    made = [len(output) for output in outputs]
    asked = [ask.output for ask in workload.asks]
    if made != asked:
        raise Failure(f"made {sum(made)} tokens in {len(made)} requests, not {sum(asked)}")
