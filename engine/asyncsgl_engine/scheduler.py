"""Decides which tokens each step computes and which pages they use."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection

from .config import ResolvedConfig
from .draft import Draft, Scheduled
from .errors import InternalError, PromptTooLong
from .plan import DRAWN, Row
from .request import Request
from .sequence import Sequence
from .sharing import Leaders, Sharing

__all__ = ["Scheduler"]

_CANDIDATES = 64
_MOST_OVERTAKEN = 16
_WORTH_A_STEP = 64
"""Tokens that make it worth while to wait a step for the page they can be copied from."""


def _rank(sequence: Sequence) -> tuple[int, int]:
    return -sequence.request.priority, sequence.serial


class Scheduler:
    """Books of sequences and pages; no clock, no tensors, no waiting.

    Sequences that decode come first in a step, then those in prefill, then new ones, under a
    budget of tokens. A prefix that several sequences share is computed by the first of them:
    the others join in the same step as far as it is planned there, and wait for the rest.
    When pages run out, unused prefixes go first, then the weakest sequence (lowest priority,
    latest arrival) loses its pages to the tree and is computed again later.

    New sequences come in by priority, and among the first of those that wait, by how much of
    them is cached; who was overtaken often comes before that.

    Args:
        config: sizes and limits.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self._page_size = config.page_size
        self._budget = config.chunked_prefill_size
        self._limit = config.sequence_limit
        self._context = config.context_length
        self._sharing = Sharing(config)
        self.pool = self._sharing.pool
        self.tree = self._sharing.tree
        self._slots = config.max_running_requests
        self._free_slots = list(range(self._slots - 1, -1, -1))
        # Both in order of rank.
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._serial = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences without one."""
        return len(self._waiting)

    def add(self, request: Request) -> Sequence:
        """Queue a request.

        Raises:
            PromptTooLong: its prompt and one token more do not fit, even alone.
        """
        self.check_length(request)
        self._serial += 1
        sequence = Sequence(request, self._serial, self._limit, tokens=list(request.prompt_ids))
        insort(self._waiting, sequence, key=_rank)
        return sequence

    def check_length(self, request: Request) -> None:
        """Refuse what can never run.

        Raises:
            PromptTooLong: as `add`.
        """
        spare = 1 if request.sampling.max_new_tokens else 0
        if len(request.prompt_ids) + spare > self._limit:
            reason = "context_length" if self._limit == self._context else "max_total_tokens"
            raise PromptTooLong(len(request.prompt_ids), self._limit - spare, reason)

    def append(self, sequence: Sequence, token: int) -> None:
        """Tell which token a step drew for a sequence, or which one follows without that."""
        sequence.append(token)
        if sequence.drawing:
            sequence.drawing -= 1

    def force(self, sequence: Sequence, token: int) -> None:
        """Tell which token follows, whatever a step under way draws in its place."""
        sequence.force(token)

    def close(self, sequence: Sequence) -> None:
        """Tell that no token follows the last one; what is to be scored before it still is."""
        sequence.closed = True

    def remove(self, sequence: Sequence, keep: bool = True) -> None:
        """Forget a sequence, finished or not.

        Args:
            keep: let its computed pages stay cached; else only those that others use too.
        """
        if sequence.slot >= 0:
            self._unseat(sequence, keep)
        else:
            _take_out(self._waiting, sequence)

    def retreat(self, scheduled: Scheduled) -> None:
        """Undo a step whose forward pass failed, and distrust all that was computed so far.

        Every running sequence waits again, with the tokens that it has. Where several steps are
        under way, all are undone, the latest first.
        """
        for row, sequence in zip(scheduled.plan.rows, scheduled.sequences, strict=True):
            sequence.scored -= len(row.targets)
            end = row.start + len(row.tokens)
            if row.sample and end < len(sequence.tokens) and sequence.request.return_logprob:
                sequence.scored = end - 1  # it would have scored what was forced there
            sequence.drawing = 0
        for sequence in tuple(self._running):
            self._unseat(sequence)
            insort(self._waiting, sequence, key=_rank)
        self.tree.clear()

    def clear_cache(self) -> bool:
        """Forget every cached prefix; refused (False) while sequences run."""
        if self._running:
            return False
        self.tree.clear()
        return True

    def check(self) -> None:
        """Prove that page counts, tables and slots agree.

        Raises:
            InternalError: they do not.
        """
        self.pool.check([sequence.pages for sequence in self._running], self.tree.pages())
        self.tree.check()
        for sequence in self._running:
            if len(sequence.pages) * self._page_size < sequence.computed:
                raise InternalError(f"sequence {sequence.serial} has tokens without pages")
            if (
                sequence.node is not None
                and self.tree.path(sequence.node) != (sequence.pages[: sequence.node_pages])
            ):
                raise InternalError(f"sequence {sequence.serial} lost pages that are cached")
        slots = sorted([*self._free_slots, *(sequence.slot for sequence in self._running)])
        if slots != list(range(self._slots)):
            raise InternalError("slots are lost or taken twice")
        if any(sequence.pages or sequence.slot >= 0 for sequence in self._waiting):
            raise InternalError("a waiting sequence holds pages or a slot")
        for queue in (self._running, self._waiting):
            if queue != sorted(queue, key=_rank):
                raise InternalError("a queue is out of order")

    def plan(self, only: Collection[Sequence] = ()) -> Scheduled | None:
        """Decide the next step and take the pages it needs; None when there is nothing to do.

        The step before may still be under way: what it draws is taken as `DRAWN`, and what is
        planned here must be computed after it. The tokens planned count as computed from here
        on, so a step that fails must be followed by `retreat`, or by removing every running
        sequence and clearing the cache.

        Args:
            only: plan for these sequences alone; all others wait.
        """
        draft = Draft(self._budget)
        for other in [other for other in self._running if only and other not in only]:
            self._preempt(other)
        order = tuple(self._running)
        rest: list[Sequence] = []
        for sequence in order:
            due = sequence.due
            if due == 1:
                self._continue(sequence, draft, order)
            elif due:
                rest.append(sequence)
        for sequence in rest:
            self._continue(sequence, draft, order)
        if only:
            self._admit(sorted((one for one in only if one.slot < 0), key=_rank), draft, rest)
        elif self._waiting and self._free_slots and draft.budget > 0:
            self._admit(self._candidates(), draft, rest)
        if draft.single or draft.many:
            return draft.finished()
        if any(sequence.due for sequence in self._running):
            raise InternalError("sequences run but none of them can go on")
        return None

    # -- sequences that run ------------------------------------------------------------------

    def _continue(self, sequence: Sequence, draft: Draft, order: tuple[Sequence, ...]) -> None:
        if sequence.slot < 0 or draft.budget < 1:
            return
        wanted = min(sequence.due, draft.budget)
        count = len(sequence.pages) * self._page_size - sequence.computed
        if count < wanted:
            count = self._room(sequence, wanted, draft, order)
        if count:
            self._schedule(sequence, min(count, wanted), draft)
        elif sequence.due == 1 or not draft.scheduled:
            self._preempt(sequence)

    def _room(
        self, sequence: Sequence, wanted: int, draft: Draft, order: tuple[Sequence, ...]
    ) -> int:
        """Take pages, from weaker sequences where there are no others."""
        count = self._sharing.room(sequence, wanted)
        while count < wanted:
            victim = next(
                (
                    other
                    for other in reversed(order)
                    if other.slot >= 0 and other.serial not in draft.scheduled
                ),
                sequence,
            )
            if victim is sequence:
                break
            self._preempt(victim)
            count = self._sharing.room(sequence, wanted)
        return count

    def _schedule(self, sequence: Sequence, count: int, draft: Draft) -> None:
        start = sequence.computed
        end = sequence.computed = start + count
        length = sequence.length
        sample = end == length and sequence.max_new_tokens > 0 and not sequence.closed
        score_from, targets = self._scores(sequence, start, end)
        fresh_from = min(sequence.synced, self._sharing.share(sequence, draft.computing))
        sequence.synced = len(sequence.pages)
        tokens = sequence.tokens[start:end]
        if len(tokens) < count:
            tokens.append(DRAWN)
        row = Row(
            sequence.slot,
            tokens,
            start,
            sequence.pages,
            fresh_from,
            score_from,
            targets,
            sample,
        )
        sequence.drawing += sample
        if count == 1:
            draft.single.append((row, sequence))
        else:
            draft.many.append((row, sequence))
        if end == length and start < sequence.prompt_tokens:
            page = self._sharing.lay_tail(sequence)
            if page is not None:
                draft.computing.add(page)
        draft.scheduled.add(sequence.serial)
        draft.budget -= count

    def _scores(self, sequence: Sequence, start: int, end: int) -> tuple[int, list[int]]:
        """Which of positions `start` to `end` - 1 are scored, and against which tokens."""
        first = max(sequence.scored, start)
        last = min(end, sequence.score_end)
        if first >= last:
            return end - start, []
        sequence.scored = last
        return first - start, sequence.tokens[first + 1 : last + 1]

    # -- sequences that wait -----------------------------------------------------------------

    def _candidates(self) -> list[Sequence]:
        """The front of the queue: by priority, the overtaken, longest cached prefix, arrival."""
        front = self._waiting[:_CANDIDATES]
        for sequence in front:
            self._sharing.seek(sequence)
        if self._sharing.enabled and len(front) > 1:
            front.sort(
                key=lambda sequence: (
                    -sequence.request.priority,
                    0 if sequence.overtaken >= _MOST_OVERTAKEN else 1,
                    0 if sequence.overtaken >= _MOST_OVERTAKEN else -sequence.node_pages,
                    sequence.serial,
                )
            )
        return front

    def _admit(self, candidates: list[Sequence], draft: Draft, prefilling: list[Sequence]) -> None:
        """Let candidates in, in their order, as far as slots, tokens and pages go.

        1. What a running sequence computes for it in a later step, a candidate waits for.
        2. So it does for part of a page that is computed in this step and can be copied after
           it, if all who wait for such pages save as much as a step costs.
        3. The first that finds no room for all its tokens ends it: later ones that are smaller
           must not keep it out.
        """
        leaders: Leaders = set()
        for sequence in prefilling:
            if sequence.slot >= 0:
                self._sharing.lead(sequence, leaders)
        reserve = sum(self._sharing.missing(sequence) for sequence in self._running)
        late: list[Sequence] = []
        saved = 0
        for sequence in candidates:
            # What it drew before it lost its place is told after the step under way.
            if not self._free_slots or draft.budget < 1 or sequence.drawing:
                break
            if not sequence.due:
                continue  # all that it waits for is what the step under way gives
            self._sharing.seek(sequence)
            if self._sharing.led(sequence, leaders):
                continue
            coming = self._sharing.coming(sequence, draft.computing)
            if coming:
                late.append(sequence)
                saved += coming
                continue
            if not self._fits(sequence, reserve):
                late.clear()
                break
            self._let_in(sequence, draft)
            reserve += self._sharing.missing(sequence)
            self._sharing.lead(sequence, leaders)
        if saved < _WORTH_A_STEP:
            for sequence in late:
                if not self._free_slots or draft.budget < 1 or not self._fits(sequence, reserve):
                    break
                self._let_in(sequence, draft)
                reserve += self._sharing.missing(sequence)
        self._note_overtaken(candidates, draft.seated)

    def _fits(self, sequence: Sequence, reserve: int) -> bool:
        if not self._running:
            return True
        needed = self._sharing.missing(sequence) + reserve
        spare = self.pool.free + self.pool.cached
        if sequence.node is not None:
            needed -= sequence.node_pages
            spare -= self.tree.unheld(sequence.node)
        return needed <= spare

    def _let_in(self, sequence: Sequence, draft: Draft) -> None:
        _take_out(self._waiting, sequence)
        insort(self._running, sequence, key=_rank)
        sequence.slot = self._free_slots.pop()
        sequence.overtaken = 0
        draft.seated.append(sequence)
        copy = self._sharing.take(sequence, draft.computing)
        if copy is not None:
            draft.copies.append(copy)
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
            self.prompt_tokens += sequence.prompt_tokens
            self.cached_tokens += sequence.computed
        count = self._sharing.room(sequence, min(sequence.due, draft.budget))
        if not count:
            raise InternalError("a sequence was admitted without room for it")
        self._schedule(sequence, count, draft)

    def _note_overtaken(self, candidates: list[Sequence], seated: list[Sequence]) -> None:
        for winner in seated:
            for sequence in candidates:
                if (
                    sequence.slot < 0
                    and sequence.serial < winner.serial
                    and sequence.request.priority == winner.request.priority
                ):
                    sequence.overtaken += 1

    # -- sequences that make room --------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        self._unseat(sequence)
        insort(self._waiting, sequence, key=_rank)
        sequence.retractions += 1
        self.preemptions += 1

    def _unseat(self, sequence: Sequence, keep: bool = True) -> None:
        _take_out(self._running, sequence)
        self._sharing.settle(sequence, keep)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1


def _take_out(queue: list[Sequence], sequence: Sequence) -> None:
    at = bisect_left(queue, _rank(sequence), key=_rank)
    if at == len(queue) or queue[at] is not sequence:
        raise InternalError(f"sequence {sequence.serial} is neither running nor waiting")
    del queue[at]
