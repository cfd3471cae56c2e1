"""The engine without a shell: requests in, one step, deltas out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several

from .answer import Answer, TextTokenizer
from .antechamber import Antechamber, Guest
from .config import ResolvedConfig
from .constraints import Constraints, Follower, Masking
from .errors import EngineError, InvalidRequest, RankFailed, StepFailed
from .flight import Flight
from .isolation import Trial
from .plan import Outcome, Row, Runner, Seat
from .request import Delta, Request, TokenLogprob
from .scheduler import Scheduler
from .sequence import Sequence
from .statistics import Statistics
from .stops import compile_patterns

__all__ = ["EngineCore"]


class EngineCore:
    """Synchronous, owned by one thread, without locks.

    Args:
        config: sizes and limits.
        runner: computes plans.
        tokenizer: decodes what comes out.
        constraints: follows grammars.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        runner: Runner,
        tokenizer: TextTokenizer,
        constraints: Constraints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._constraints = constraints
        self._clock = clock
        self._scheduler = Scheduler(config)
        self._answers: dict[str, Answer] = {}
        self._followers: dict[str, Follower] = {}
        self._antechamber = Antechamber(constraints)
        self._flight: Flight | None = None
        self._trial = Trial()
        self._finished = self._aborted = self._failed = 0
        self._steps = self._computed = self._generated = 0
        self._busy_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._answers) or len(self._antechamber) > 0

    @property
    def can_step(self) -> bool:
        """Whether a step has something to do; not while all wait for their grammars."""
        return bool(self._answers) or self._antechamber.ready

    def step(self, new: Iterable[Request] = (), cancelled: Iterable[str] = ()) -> list[Delta]:
        """Take requests in, drop cancelled ones, launch one forward pass and collect one.

        The pass collected is the one launched, or with `overlap` the one before it: what it
        gave is then taken in while the device computes the next.

        Args:
            new: requests, their ids not in use.
            cancelled: ids to abort, before `new` is taken in; unknown ones are ignored.

        Returns:
            The deltas of this step. Every request ends in exactly one with `finish` or
            `error`.

        Raises:
            RankFailed: there can be no further step; what is left is for `fail_all`.
        """
        begun = self._clock()
        deltas = [delta for name in cancelled if (delta := self._abort(name, begun))]
        deltas += [delta for request in new if (delta := self._receive(request, begun))]
        for guest, follower in self._antechamber.leaving():
            delta = self._enter(guest, follower)
            deltas += [delta] if delta is not None else []
        if self._answers:
            deltas += self._advance(begun)
            self._busy_s += self._clock() - begun
        if not self._answers:
            self._flight = None  # nobody wants what it gives
        if self._config.debug_check:
            self.check()
        return deltas

    def clear_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, while sequences run."""
        return self._scheduler.clear_cache()

    def check(self) -> None:
        """Prove that the books agree with one another.

        Raises:
            InternalError: they do not.
        """
        self._scheduler.check()

    def fail_all(self, error: EngineError) -> list[Delta]:
        """End every request with an error."""
        self._flight = None
        deltas = [self._fail(answer, error) for answer in list(self._answers.values())]
        guests = self._antechamber.dismiss_all()
        self._failed += len(guests)
        deltas += [Delta(guest.request.request_id, error=error) for guest in guests]
        self._scheduler.clear_cache()
        return deltas

    def statistics(self) -> Statistics:
        """Counters and gauges of this moment."""
        pool = self._scheduler.pool
        return Statistics(
            pages_total=pool.num_pages,
            pages_free=pool.free,
            pages_cached=pool.cached,
            pages_held=pool.held,
            waiting=self._scheduler.waiting + len(self._antechamber),
            compiling=len(self._antechamber),
            running=self._scheduler.running,
            finished=self._finished,
            aborted=self._aborted,
            failed=self._failed,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            prompt_tokens=self._scheduler.prompt_tokens,
            cached_tokens=self._scheduler.cached_tokens,
            generated_tokens=self._generated,
            computed_tokens=self._computed,
            busy_s=self._busy_s,
        )

    # -- requests come and go ---------------------------------------------------------------

    def _receive(self, request: Request, now: float) -> Delta | None:
        name, grammar = request.request_id, request.grammar
        try:
            if name in self._answers or name in self._antechamber:
                raise InvalidRequest("request_id", f"{name!r} is in use by a running request")
            self._check_tokens(request)
            self._scheduler.check_length(request)
            guest = Guest(request, compile_patterns(request.sampling.stop_regex), now)
        except EngineError as error:
            self._failed += 1
            return Delta(name, error=error)
        if grammar is None:
            return self._enter(guest, None)
        self._antechamber.receive(guest, grammar)
        return None

    def _enter(self, guest: Guest, follower: Follower | EngineError | None) -> Delta | None:
        """Queue a request whose grammar, if it has one, is compiled."""
        name = guest.request.request_id
        if isinstance(follower, EngineError):
            self._failed += 1
            return Delta(name, error=follower)
        if follower is not None:
            self._followers[name] = follower
        sequence = self._scheduler.add(guest.request)
        self._answers[name] = Answer(sequence, self._tokenizer, guest.patterns, guest.arrived)
        return None

    def _check_tokens(self, request: Request) -> None:
        size = self._config.model.vocab_size
        named = (
            ("prompt_ids", request.prompt_ids),
            ("stop_token_ids", request.sampling.stop_token_ids),
            ("token_ids_logprob", request.token_ids_logprob),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
        )
        for field, tokens in named:
            if tokens and not (min(tokens) >= 0 and max(tokens) < size):
                bad = next(token for token in tokens if not 0 <= token < size)
                raise InvalidRequest(field, f"token id {bad} is not in [0, {size - 1}]")

    def _abort(self, name: str, now: float) -> Delta | None:
        if guest := self._antechamber.dismiss(name):
            self._aborted += 1
            return self._unseen(guest, now)
        answer = self._answers.get(name)
        if answer is None:
            return None
        answer.end("abort")
        self._leave(answer)
        self._aborted += 1
        return answer.delta(now)

    def _unseen(self, guest: Guest, now: float) -> Delta | None:
        """The end of a request that was aborted before it was queued."""
        request = guest.request
        limit = self._config.sequence_limit
        sequence = Sequence(request, 0, limit, tokens=list(request.prompt_ids))
        answer = Answer(sequence, self._tokenizer, guest.patterns, guest.arrived)
        answer.end("abort")
        return answer.delta(now)

    def _fail(self, answer: Answer, error: EngineError) -> Delta:
        self._leave(answer, keep=not isinstance(error, StepFailed))
        self._failed += 1
        return Delta(answer.sequence.request.request_id, error=error)

    def _leave(self, answer: Answer, keep: bool = True) -> None:
        name = answer.sequence.request.request_id
        del self._answers[name]
        self._followers.pop(name, None)
        self._trial.acquit(answer.sequence)
        self._scheduler.remove(answer.sequence, keep)

    # -- one step -----------------------------------------------------------------------------

    def _advance(self, begun: float) -> list[Delta]:
        """Launch the next pass, collect the one under way, draw from the next."""
        deltas: list[Delta] = []
        before, self._flight = self._flight, None
        if before is not None and self._must_land(before):
            deltas += self._land(before)
            before = None
        scheduled = self._scheduler.plan(self._trial.group)
        if scheduled is None:
            return deltas + (self._land(before) if before is not None else [])
        answers = [self._answers[seq.request.request_id] for seq in scheduled.sequences]
        flight = Flight(scheduled, tuple(answers))
        # Masks take a while: they are begun before a pass that nothing else must come before.
        masking = self._mask(flight) if before is None else None
        try:
            self._launch(flight, begun)
        except RankFailed:
            raise
        except Exception as error:  # noqa: BLE001 - who is to blame is found out
            flight.error = error
        if before is not None:
            deltas += self._land(before, flight)
        if flight.error is None and not flight.lost:
            try:
                flight.masking = masking or self._mask(flight)
                flight.draw()
            except Exception as error:  # noqa: BLE001 - as above
                flight.error = error
        if self._config.overlap and not self._trial and flight.error is None:
            self._flight = None if flight.lost else flight
            return deltas
        return deltas + self._land(flight)

    def _must_land(self, flight: Flight) -> bool:
        """Whether the next pass is planned only after this one is collected.

        Where most rows follow grammars it is: what a grammar forces after the token that is
        being drawn would need a pass more.
        """
        constrained = sum(answer.sequence.request.grammar is not None for answer in flight.answers)
        return bool(self._trial) or 2 * constrained >= len(flight.answers)

    def _launch(self, flight: Flight, begun: float) -> None:
        for sequence in flight.scheduled.seated:
            answer = self._answers[sequence.request.request_id]
            answer.start(begun)
            self._runner.seat(self._seat(answer))
        flight.launched = self._runner.launch(flight.scheduled.plan)

    def _land(self, flight: Flight, later: Flight | None = None) -> list[Delta]:
        """Collect a pass and take in what it gave.

        Args:
            later: launched after it; lost if this one failed.
        """
        if flight.lost:
            return []
        try:
            outcome = flight.outcome()
        except RankFailed:
            raise
        except Exception as error:  # noqa: BLE001 - a failed pass ends no more than it must
            return self._blame(flight, later, error)
        self._steps += 1
        self._computed += flight.scheduled.plan.num_tokens
        now = self._clock()
        deltas = []
        for index, answer in enumerate(flight.answers):
            if not self._has(answer):
                continue
            try:
                self._commit(answer, index, flight, outcome, now)
            except EngineError as error:
                deltas.append(self._fail(answer, error))
                continue
            if answer.ended:
                self._leave(answer)
                self._finished += 1
            delta = answer.delta(now)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _has(self, answer: Answer) -> bool:
        """Whether somebody still waits for an answer."""
        return self._answers.get(answer.sequence.request.request_id) is answer

    def _blame(self, flight: Flight, later: Flight | None, error: Exception) -> list[Delta]:
        """A pass failed: its keys and values are not to be trusted, nor any after it."""
        for undone in (later, flight):
            if undone is not None:
                undone.lost = True
                self._scheduler.retreat(undone.scheduled)
        suspects = [answer.sequence for answer in flight.answers if self._has(answer)]
        culprit = self._trial.accuse(suspects, others=len(suspects) < len(flight.answers))
        if culprit is None:
            return []
        name = culprit.request.request_id
        failure = StepFailed(
            f"the forward pass fails with request {name!r} in it, "
            f"and with no other ({type(error).__name__}: {error})"
        )
        failure.__cause__ = error
        return [self._fail(self._answers[name], failure)]

    def _seat(self, answer: Answer) -> Seat:
        sequence = answer.sequence
        seed = sequence.request.sampling.seed
        if seed is None:
            seed = self._config.random_seed * 0x9E3779B97F4A7C15 + sequence.serial
        return Seat(sequence.slot, sequence.request, sequence.tokens, seed, answer.stop_ids)

    def _mask(self, flight: Flight) -> Masking:
        rows: list[int] = []
        followers: list[Follower] = []
        if self._followers:
            for index, answer in enumerate(flight.answers):
                follower = self._followers.get(answer.sequence.request.request_id)
                if follower is not None and self._has(answer) and flight.draws(index):
                    rows.append(index)
                    followers.append(follower)
        return self._constraints.begin(rows, followers)

    def _commit(
        self, answer: Answer, index: int, flight: Flight, outcome: Outcome, now: float
    ) -> None:
        """Take one row's results into its answer."""
        flight.masking.check(index)
        sequence = answer.sequence
        if index in outcome.faulty:
            raise StepFailed(
                f"the model gives no numbers for request {sequence.request.request_id!r} "
                "(NaN or infinite logits): weights, dtype and prompt are what to look at"
            )
        end = flight.end(index)
        self._trial.passed(sequence, end)
        row, logprob = flight.scheduled.plan.rows[index], outcome.logprobs.get(index)
        self._score(answer, row, outcome.scores.get(index, ()), now)
        if not row.sample and end == sequence.prompt_tokens and sequence.max_new_tokens == 0:
            answer.end("length")
        if not row.sample or answer.ended:
            return
        if not flight.draws(index):  # a forced token took the place of the one that was drawn
            self._take_forced(answer, (logprob,) if logprob is not None else (), now)
            return
        token = outcome.tokens[index]
        self._scheduler.append(sequence, token)
        self._take(answer, token, logprob, now)
        follower = self._followers.get(sequence.request.request_id)
        if follower is None or answer.ended:
            return
        follower.accept(token)
        if follower.finished:
            answer.end("stop")
        else:
            self._force(answer, follower, now)

    def _take(self, answer: Answer, token: int, logprob: TokenLogprob | None, now: float) -> None:
        self._generated += 1
        answer.take(token, logprob, now)

    def _score(self, answer: Answer, row: Row, entries: Several[TokenLogprob], now: float) -> None:
        """Take log-probabilities of tokens that were known before: of the prompt, or forced."""
        if row.start + row.score_from + 1 < answer.sequence.prompt_tokens:
            answer.score(entries)
        else:
            self._take_forced(answer, entries, now)

    def _force(self, answer: Answer, follower: Follower, now: float) -> None:
        """Append what the grammar leaves no choice about; it is computed with the next step.

        Where log-probabilities are wanted, the answer takes a token with its own, which come
        from that step.
        """
        sequence = answer.sequence
        scored = sequence.request.return_logprob
        for token in follower.forced():
            if sequence.output_tokens >= sequence.max_new_tokens:
                break
            self._scheduler.force(sequence, token)
            if not scored:
                self._take(answer, token, None, now)
            if answer.ended:
                return
            follower.accept(token)
        if follower.finished and not scored:
            answer.end("stop")
        elif follower.finished or sequence.output_tokens >= sequence.max_new_tokens:
            self._scheduler.close(sequence)

    def _take_forced(self, answer: Answer, entries: Several[TokenLogprob], now: float) -> None:
        """Take forced tokens with their log-probabilities."""
        sequence = answer.sequence
        for entry in entries:
            self._take(answer, entry.token_id, entry, now)
            if answer.ended:
                return
        if sequence.closed and answer.taken == sequence.output_tokens:
            answer.end("stop")
