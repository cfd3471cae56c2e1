"""Computes plans on a thread of its own, as a device does that computes while its host goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from .plan import Mask, Outcome, Pass, Plan, Runner, Seat

__all__ = ["BackgroundRunner"]


class BackgroundRunner:
    """Does what a runner is asked for in order, without keeping the caller waiting for it.

    Args:
        runner: used by this thread alone from here on.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._seats: list[Seat] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="asyncsgl-forward")

    def seat(self, seat: Seat) -> None:
        """See `Runner`; what is wrong with a seat shows in the pass it is for."""
        # The tokens go on growing in the caller's hands, and so do the pages below.
        self._seats.append(
            Seat(seat.slot, seat.request, tuple(seat.tokens), seat.seed, seat.stop_ids)
        )

    def launch(self, plan: Plan) -> BackgroundPass:
        """See `Runner`."""
        seats, self._seats = self._seats, []
        rows = tuple(row._replace(pages=tuple(row.pages)) for row in plan.rows)
        launched = self._worker.submit(self._launch, seats, Plan(rows, plan.copies))
        return BackgroundPass(launched, self._worker)

    def close(self) -> None:
        """End the thread, after what it was asked for."""
        self._worker.shutdown()

    def _launch(self, seats: list[Seat], plan: Plan) -> Pass:
        for seat in seats:
            self._runner.seat(seat)
        return self._runner.launch(plan)


class BackgroundPass:
    """See `Pass`.

    Args:
        launched: of the thread's runner.
        worker: the thread.
    """

    def __init__(self, launched: Future[Pass], worker: ThreadPoolExecutor) -> None:
        self._launched, self._worker = launched, worker
        self._drawn: Future[None] | None = None

    def draw(self, mask: Mask | None, forced: Mapping[int, int]) -> None:
        """See `Pass`."""
        self._drawn = self._worker.submit(self._draw, mask, forced)

    def outcome(self) -> Outcome:
        """See `Pass`."""
        assert self._drawn is not None, "draw comes first"
        self._drawn.result()
        return self._launched.result().outcome()

    def _draw(self, mask: Mask | None, forced: Mapping[int, int]) -> None:
        # Launched by now, as the thread does one thing after another.
        self._launched.result().draw(mask, forced)
