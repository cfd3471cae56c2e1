"""A runner without a model: its memory holds tokens, and what it draws follows from them.

Both the tokens it draws and the log-probabilities it tells depend on every token of a sequence as
it lies in memory. So an answer is right only if each step read the right pages, whatever came in
between; what is right, `Expected` works out a token at a time, without pages or steps.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from asyncsgl_engine.config import ResolvedConfig
from asyncsgl_engine.grammar import GrammarCompiler
from asyncsgl_engine.plan import DRAWN, Mask, Outcome, Plan, Row, Seat
from asyncsgl_engine.request import Completion, Request, TokenLogprob
from tests.engine.books import Cell, whose

__all__ = ["Expected", "TokenRunner"]

_FREE = (0, 1, 2, 3, 4)
"""Tokens that are drawn where no grammar says which."""

END = 257
"""The token that ends a text where a grammar lets it end: that of the tests' tokenizer."""


def _drawn(history: Sequence[int], allowed: Sequence[int]) -> int:
    return allowed[zlib.crc32(array("H", history).tobytes()) % len(allowed)]


def _told(history: Sequence[int], token: int) -> TokenLogprob:
    code = zlib.crc32(array("H", [*history, token]).tobytes())
    return TokenLogprob(token, -(code % 1000) / 100)


def _allowed(bits: np.ndarray[tuple[int], np.dtype[np.int32]]) -> list[int]:
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(flags).tolist()
    return found


class Expected:
    """What a request's answer is to be.

    Args:
        request: what was asked for.
        limit: most tokens of its sequence.
        compiler: of grammars.
    """

    def __init__(self, request: Request, limit: int, compiler: GrammarCompiler) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reason = "length"
        prompt = request.prompt_ids
        self._most = min(request.sampling.max_new_tokens, limit - len(prompt))
        state = None if request.grammar is None else compiler.compile(request.grammar).new_state()
        while len(self.tokens) < self._most:
            history = [*prompt, *self.tokens]
            allowed: Sequence[int] = _FREE
            if state is not None:
                bits = compiler.allocate(1)
                state.fill_mask(bits[0])
                allowed = _allowed(bits[0])
            token = _drawn(history, allowed)
            self.tokens.append(token)
            self.logprobs.append(_told(history, token))
            if token in (END, *request.sampling.stop_token_ids):
                self.reason = "stop"
                return
            if state is not None and len(self.tokens) < self._most:
                state.accept(token)
                if state.is_finished:
                    self.reason = "stop"
                    return

    def check(self, answer: Completion) -> None:
        """The answer is that, or where it was aborted its beginning."""
        made, request = len(answer.token_ids), self.request
        assert answer.token_ids == tuple(self.tokens[:made])
        told = self.logprobs[:made] if request.return_logprob else []
        assert answer.logprobs == tuple(told)
        assert answer.finish.completion_tokens == made
        if answer.finish.reason == "abort":
            return
        assert made == len(self.tokens)
        assert answer.finish.reason == self.reason
        prompt, start = request.prompt_ids, request.logprob_start_len
        scores = [_told(prompt[:at], prompt[at]) for at in range(max(start, 1), len(prompt))]
        if start == 0:
            scores.insert(0, TokenLogprob(prompt[0], None))
        assert answer.prompt_logprobs == tuple(scores if start >= 0 else ())


class TokenRunner:
    """See `Runner`.

    Args:
        config: sizes.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self._size = config.page_size
        self._cells: list[Cell] = [None] * (config.num_pages * config.page_size)
        self._tables: dict[int, list[int]] = {}
        self._seats: dict[int, Seat] = {}
        self._drawn: dict[int, tuple[str, int, int]] = {}
        self.faults: list[str] = []
        """Where the next passes fail, the first one last: `launch`, `outcome` or nowhere."""
        self.failed: list[set[str]] = []
        """Whose passes failed."""

    def seat(self, seat: Seat) -> None:
        """See `Runner`."""
        assert seat.tokens[: len(seat.request.prompt_ids)] == list(seat.request.prompt_ids)
        self._seats[seat.slot] = seat

    def launch(self, plan: Plan) -> TokenPass:
        """See `Runner`: all is computed here, but for what is drawn."""
        fault = self.faults.pop() if self.faults else ""
        for copy in plan.copies:
            source, target = copy.source * self._size, copy.target * self._size
            self._cells[target : target + copy.tokens] = self._cells[source : source + copy.tokens]
        for row in plan.rows:
            self._write(row)
        made = TokenPass(self, plan, [self._read(row) for row in plan.rows], fault)
        if fault == "launch":
            made.fail()
        return made

    def request(self, row: Row) -> Request:
        """Whose row it is."""
        return self._seats[row.slot].request

    def tell(self, row: Row, token: int) -> None:
        """Keep a token that was drawn for the row that asks for it."""
        name, place = self.request(row).request_id, row.start + len(row.tokens)
        self._drawn[row.slot] = (name, place, token)

    def spoil(self, row: Row) -> None:
        """Lose what a row wrote."""
        for offset in range(len(row.tokens)):
            self._cells[self._place(row.slot, row.start + offset)] = None

    def _write(self, row: Row) -> None:
        request = self.request(row)
        table = self._tables.setdefault(row.slot, [])
        table[row.fresh_from :] = row.pages[row.fresh_from :]
        assert table == list(row.pages)
        for place, given in enumerate(row.tokens, row.start):
            token = given
            if given == DRAWN:
                assert len(row.tokens) == 1
                name, at, token = self._drawn[row.slot]
                assert (name, at) == (request.request_id, place)
            self._cells[self._place(row.slot, place)] = (whose(request), place, token)

    def _read(self, row: Row) -> list[int]:
        """The tokens of a sequence as far as a row goes."""
        request, history = self.request(row), []
        for place in range(row.start + len(row.tokens)):
            cell = self._cells[self._place(row.slot, place)]
            assert cell is not None, "nothing was written here"
            assert cell[:2] == (whose(request), place)
            history.append(cell[2])
        return history

    def _place(self, slot: int, position: int) -> int:
        return self._tables[slot][position // self._size] * self._size + position % self._size


class TokenPass:
    """See `Pass`.

    Args:
        runner: its memory.
        plan: what was computed.
        histories: the tokens that each row attended to.
        fault: where it fails.
    """

    def __init__(
        self, runner: TokenRunner, plan: Plan, histories: list[list[int]], fault: str
    ) -> None:
        self._runner, self._histories = runner, histories
        self._rows = [(row._replace(pages=()), runner.request(row)) for row in plan.rows]
        self._plan, self._fault = plan, fault
        self._tokens = [-1] * len(plan.rows)
        self._logprobs: dict[int, TokenLogprob] = {}

    def fail(self) -> None:
        """Raise, and leave nothing that could be relied on."""
        self._runner.failed.append({request.request_id for _, request in self._rows})
        for row in self._plan.rows:
            self._runner.spoil(row)
        raise MemoryError("no room")

    def draw(self, mask: Mask | None, forced: Mapping[int, int]) -> None:
        """See `Pass`."""
        limits = {} if mask is None else dict(zip(mask.rows, mask.bits, strict=True))
        for index, (row, request) in enumerate(self._rows):
            if not row.sample:
                assert index not in limits
                continue
            history = self._histories[index]
            allowed = _allowed(limits[index]) if index in limits else _FREE
            token = self._tokens[index] = _drawn(history, allowed)
            if index not in forced:
                self._runner.tell(row, token)
            if request.return_logprob:
                self._logprobs[index] = _told(history, forced.get(index, token))

    def outcome(self) -> Outcome:
        """See `Pass`."""
        if self._fault == "outcome":
            self.fail()
        scores = {}
        for index, (row, _) in enumerate(self._rows):
            if row.targets:
                first = row.start + row.score_from + 1
                history = self._histories[index]
                scores[index] = tuple(
                    _told(history[:place], token) for place, token in enumerate(row.targets, first)
                )
        return Outcome(self._tokens, self._logprobs, scores)
