"""Decides which tokens each step computes and which pages they use."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from .config import ResolvedConfig
from .errors import InternalError, PromptTooLong
from .pages import PagePool
from .plan import PageCopy, Plan, Row
from .radix import Match, PrefixTree
from .request import Request
from .sequence import Sequence

__all__ = ["Scheduled", "Scheduler"]

_CANDIDATES = 64
_STARVED_AFTER = 16
_WORTH_COPYING = 4

Leaders = set[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A step as decided.

    Args:
        plan: for the runner.
        sequences: whose rows they are, in the order of the plan's rows.
        seated: sequences that got a slot just now; the runner must be told of them first.
    """

    plan: Plan
    sequences: tuple[Sequence, ...]
    seated: tuple[Sequence, ...]


def _rank(sequence: Sequence) -> tuple[int, int]:
    return -sequence.request.priority, sequence.serial


class _Draft:
    """A plan in the making."""

    __slots__ = ("budget", "computing", "copies", "many", "scheduled", "seated", "single")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.single: list[tuple[Row, Sequence]] = []
        self.many: list[tuple[Row, Sequence]] = []
        self.copies: list[PageCopy] = []
        self.seated: list[Sequence] = []
        self.scheduled: set[int] = set()
        self.computing: set[int] = set()


class Scheduler:
    """Books of sequences and pages; no clock, no tensors, no waiting.

    Sequences that decode come first in a step, then those in prefill, then new ones, under a
    budget of tokens. A prefix that several sequences share is computed by the first of them:
    the others join in the same step as far as it is planned there, and wait for the rest.
    When pages run out, unused prefixes go first, then the weakest sequence (lowest priority,
    latest arrival) loses its pages to the tree and is computed again later.

    Args:
        config: sizes and limits.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self._page_size = config.page_size
        self._budget = config.chunked_prefill_size
        self._limit = config.sequence_limit
        self._context = config.context_length
        self._shares = config.radix_cache
        self.pool = PagePool(config.num_pages)
        self.tree = PrefixTree(self.pool, config.page_size)
        self._free_slots = list(range(config.max_running_requests - 1, -1, -1))
        self._running: dict[int, Sequence] = {}
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
        spare = 1 if request.sampling.max_new_tokens else 0
        if len(request.prompt_ids) + spare > self._limit:
            reason = "context_length" if self._limit == self._context else "max_total_tokens"
            raise PromptTooLong(len(request.prompt_ids), self._limit - spare, reason)
        self._serial += 1
        sequence = Sequence(request, self._serial, self._limit, tokens=list(request.prompt_ids))
        if sequence.wants_prompt_logprobs:
            sequence.scored = max(request.logprob_start_len - 1, 0)
        insort(self._waiting, sequence, key=_rank)
        return sequence

    def append(self, sequence: Sequence, token: int) -> None:
        """Tell which token follows in a running sequence."""
        sequence.tokens.append(token)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its full pages stay cached."""
        if self._running.pop(sequence.serial, None) is not None:
            self._unseat(sequence)
            return
        at = bisect_left(self._waiting, _rank(sequence), key=_rank)
        if at == len(self._waiting) or self._waiting[at] is not sequence:
            raise InternalError(f"sequence {sequence.serial} is neither running nor waiting")
        del self._waiting[at]

    def everything(self) -> tuple[Sequence, ...]:
        """All sequences, running ones first."""
        return (*self._running.values(), *self._waiting)

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
        running = self._running.values()
        self.pool.check([sequence.pages for sequence in running], self.tree.pages())
        for sequence in running:
            if len(sequence.pages) * self._page_size < sequence.computed:
                raise InternalError(f"sequence {sequence.serial} has tokens without pages")
            if sequence.node is not None and sequence.node_pages > len(sequence.pages):
                raise InternalError(f"sequence {sequence.serial} lost pages that are cached")
        slots = sorted([*self._free_slots, *(sequence.slot for sequence in running)])
        if slots != list(range(len(slots))):
            raise InternalError("slots are lost or taken twice")
        if any(sequence.pages or sequence.slot >= 0 for sequence in self._waiting):
            raise InternalError("a waiting sequence holds pages or a slot")

    def plan(self) -> Scheduled | None:
        """Decide the next step and take the pages it needs; None when there is nothing to do.

        The tokens planned count as computed from here on, so a step that fails must be
        followed by removing every running sequence and clearing the cache.
        """
        draft = _Draft(self._budget)
        order = sorted(self._running.values(), key=_rank)
        for sequence in order:
            if sequence.pending == 1:
                self._continue(sequence, draft, order)
        for sequence in order:
            if sequence.pending > 1:
                self._continue(sequence, draft, order)
        if self._waiting and self._free_slots and draft.budget > 0:
            self._admit(draft)
        rows = draft.single + draft.many
        if not rows:
            if self._running:
                raise InternalError("sequences run but none of them can go on")
            return None
        plan = Plan(tuple(row for row, _ in rows), tuple(draft.copies))
        return Scheduled(plan, tuple(sequence for _, sequence in rows), tuple(draft.seated))

    def _continue(self, sequence: Sequence, draft: _Draft, order: list[Sequence]) -> None:
        if sequence.slot < 0 or draft.budget < 1:
            return
        wanted = min(sequence.pending, draft.budget)
        count = self._room(sequence, wanted)
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
            count = self._room(sequence, wanted)
        if count:
            self._schedule(sequence, count, draft)
        elif sequence.pending == 1 or not draft.scheduled:
            self._preempt(sequence)

    def _room(self, sequence: Sequence, wanted: int) -> int:
        """Take pages for `wanted` more tokens; how many of them now have a place."""
        size = self._page_size
        missing = -(-(sequence.computed + wanted) // size) - len(sequence.pages)
        if missing > self.pool.free:
            self.tree.evict(missing - self.pool.free)
        for _ in range(missing):
            page = self.pool.allocate()
            if page is None:
                break
            sequence.pages.append(page)
        return min(wanted, len(sequence.pages) * size - sequence.computed)

    def _schedule(self, sequence: Sequence, count: int, draft: _Draft) -> None:
        start = sequence.computed
        end = start + count
        tokens = sequence.tokens[start:end]
        sequence.computed = end
        score_from, targets = self._scores(sequence, start, end)
        fresh_from = min(sequence.synced, self._share(sequence, draft))
        sequence.synced = len(sequence.pages)
        row = Row(
            slot=sequence.slot,
            tokens=tokens,
            start=start,
            pages=sequence.pages,
            fresh_from=fresh_from,
            score_from=score_from,
            targets=targets,
            sample=end == len(sequence.tokens) and sequence.max_new_tokens > 0,
        )
        (draft.single if count == 1 else draft.many).append((row, sequence))
        draft.scheduled.add(sequence.serial)
        draft.budget -= count

    def _scores(self, sequence: Sequence, start: int, end: int) -> tuple[int, list[int]]:
        """Which of positions `start` to `end` - 1 are scored, and against which tokens."""
        if not sequence.wants_prompt_logprobs:
            return end - start, []
        first = max(sequence.scored, start)
        last = min(end, sequence.prompt_tokens - 1)
        if first >= last:
            return end - start, []
        sequence.scored = last
        return first - start, sequence.tokens[first + 1 : last + 1]

    def _share(self, sequence: Sequence, draft: _Draft) -> int:
        """Put the pages that this step fills into the tree; the first index that changed."""
        node = sequence.node
        if node is None:
            return len(sequence.pages)
        size, changed = self._page_size, len(sequence.pages)
        index = sequence.node_pages
        while (index + 1) * size <= sequence.computed:
            key = tuple(sequence.tokens[index * size : (index + 1) * size])
            own = sequence.pages[index]
            node = self.tree.extend(node, key, own)
            if node.page == own:
                draft.computing.add(own)
            else:
                self.pool.retain((node.page,))
                self.pool.release((own,))
                sequence.pages[index] = node.page
                changed = min(changed, index)
            index += 1
        sequence.node, sequence.node_pages = node, index
        return changed

    def _admit(self, draft: _Draft) -> None:
        leaders = self._leaders()
        reserve = sum(self._missing(sequence) for sequence in self._running.values())
        for sequence in self._candidates():
            if not self._free_slots or draft.budget < 1:
                return
            match = self._match(sequence, touch=False)
            if self._led(sequence, match, leaders):
                continue
            if not self._fits(sequence, match, reserve):
                return
            self._seat(sequence, self._match(sequence, touch=True), draft)
            count = self._room(sequence, min(sequence.pending, draft.budget))
            if not count:
                raise InternalError("a sequence was admitted without room for it")
            self._schedule(sequence, count, draft)
            reserve += self._missing(sequence)
            self._lead(sequence, leaders)

    def _candidates(self) -> list[Sequence]:
        """The front of the queue: by priority, the starved, longest cached prefix, arrival."""
        front = self._waiting[:_CANDIDATES]
        if not self._shares or len(front) == 1:
            return front
        for sequence in front:
            sequence.skipped += 1

        def order(sequence: Sequence) -> tuple[int, bool, int, int]:
            starved = sequence.skipped > _STARVED_AFTER
            match = None if starved else self._match(sequence, touch=False)
            found = 0 if match is None else len(match.pages)
            return -sequence.request.priority, not starved, -found, sequence.serial

        return sorted(front, key=order)

    def _match(self, sequence: Sequence, touch: bool) -> Match | None:
        if not self._shares or sequence.request.no_cache:
            return None
        limit = len(sequence.tokens) - 1
        if sequence.wants_prompt_logprobs:
            limit = min(limit, sequence.scored)
        salt = sequence.request.cache_salt
        return self.tree.match(sequence.tokens, limit, salt, touch)

    def _leaders(self) -> Leaders:
        leaders: Leaders = set()
        if self._shares:
            for sequence in self._running.values():
                self._lead(sequence, leaders)
        return leaders

    def _lead(self, sequence: Sequence, leaders: Leaders) -> None:
        """Note the page a sequence in prefill will fill after this step."""
        node, at = sequence.node, sequence.node_pages * self._page_size
        if node is not None and sequence.pending and at + self._page_size <= len(sequence.tokens):
            leaders.add((id(node), tuple(sequence.tokens[at : at + self._page_size])))

    def _led(self, sequence: Sequence, match: Match | None, leaders: Leaders) -> bool:
        """Whether a running sequence is about to compute the next page for this one."""
        if match is None or not leaders:
            return False
        at = len(match.pages) * self._page_size
        end = at + self._page_size
        if end > len(sequence.tokens) - 1:
            return False
        if sequence.wants_prompt_logprobs and end > sequence.scored:
            return False
        return (id(match.node), tuple(sequence.tokens[at:end])) in leaders

    def _missing(self, sequence: Sequence) -> int:
        """Pages a sequence still needs for the tokens it has, and one to grow into."""
        return -(-len(sequence.tokens) // self._page_size) + 1 - len(sequence.pages)

    def _fits(self, sequence: Sequence, match: Match | None, reserve: int) -> bool:
        if not self._running:
            return True
        found = match.pages if match is not None else []
        needed = self._missing(sequence) - len(found)
        spare = self.pool.free + self.pool.cached
        spare -= sum(self.pool.only_in_tree(page) for page in found)
        return needed + reserve <= spare

    def _seat(self, sequence: Sequence, match: Match | None, draft: _Draft) -> None:
        self._waiting.remove(sequence)
        self._running[sequence.serial] = sequence
        sequence.slot = self._free_slots.pop()
        sequence.skipped = 0
        draft.seated.append(sequence)
        if match is not None:
            self._take(sequence, match, draft)
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
            self.prompt_tokens += sequence.prompt_tokens
            self.cached_tokens += sequence.computed

    def _take(self, sequence: Sequence, match: Match, draft: _Draft) -> None:
        self.pool.retain(match.pages)
        sequence.pages.extend(match.pages)
        sequence.node, sequence.node_pages = match.node, len(match.pages)
        sequence.computed = len(match.pages) * self._page_size
        source = match.partial
        if source is None or match.partial_tokens < _WORTH_COPYING or source in draft.computing:
            return
        self.pool.retain((source,))
        if self._room(sequence, match.partial_tokens) == match.partial_tokens:
            draft.copies.append(PageCopy(source, sequence.pages[-1], match.partial_tokens))
            sequence.computed += match.partial_tokens
        self.pool.release((source,))

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.serial]
        self._unseat(sequence)
        insort(self._waiting, sequence, key=_rank)
        self.preemptions += 1

    def _unseat(self, sequence: Sequence) -> None:
        if sequence.node is not None:
            self.tree.touch(sequence.node)
        self.pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages = []
        sequence.slot = -1
        sequence.computed = sequence.synced = sequence.node_pages = 0
        sequence.node = None
