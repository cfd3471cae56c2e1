"""Any history of requests, cancels and failures gives the answers of tokens drawn one by one.

The core steps a runner whose memory holds tokens, and plans each step apart or ahead: while the
one before it is under way. The books are proven after every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from threading import Semaphore
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsgl_engine.config import ResolvedConfig
from asyncsgl_engine.constraints import Constraints
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.delivery import joined
from asyncsgl_engine.errors import PromptTooLong, StepFailed
from asyncsgl_engine.grammar import GrammarCompiler
from asyncsgl_engine.request import Delta, Grammar, Request, Sampling
from asyncsgl_engine.tokenizer import Tokenizer
from tests.engine.books import resolved
from tests.engine.conftest import VOCAB, byte_tokenizer
from tests.engine.token_runner import Expected, TokenRunner

TOKENIZER = Tokenizer(byte_tokenizer())
(Y,) = TOKENIZER.encode("y", add_special_tokens=False)
GRAMMARS = tuple(
    Grammar("regex", pattern)
    for pattern in (
        "([ab]xxyyx){3}",  # mostly forced, and stopped at y where that is asked for
        "[ab]c",  # one forced token, which is the last one
        "a(b|cd)*",  # the end is drawn
        "(maybe|yes, of course)!",
    )
)
_STEPS = 5_000

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@dataclass(frozen=True)
class Ask:
    """Requests come in that differ in nothing but their names."""

    prompt: list[int]
    new: int
    grammar: Grammar | None
    stops: bool
    scored_from: int | None
    priority: int
    salt: str | None
    no_cache: bool
    count: int

    def requests(self, name: str, before: tuple[int, ...] = ()) -> list[Request]:
        """The requests.

        Args:
            before: tokens before the prompt's own.
        """
        prompt = (*before, *self.prompt)
        start = self.scored_from
        one = Request(
            name,
            prompt,
            Sampling(
                max_new_tokens=self.new,
                stop_token_ids=(3, Y) if self.stops else (),
            ),
            self.grammar,
            stream=True,
            return_logprob=start is not None,
            logprob_start_len=-1 if start is None else min(start, len(prompt) - 1),
            priority=self.priority,
            cache_salt=self.salt,
            no_cache=self.no_cache,
        )
        return [replace(one, request_id=f"{name}-{number}") for number in range(self.count)]


@dataclass(frozen=True)
class Fork:
    """The same after what one of the answers has so far."""

    which: int
    asked: Ask


@dataclass(frozen=True)
class Step:
    times: int


@dataclass(frozen=True)
class Drop:
    which: int


@dataclass(frozen=True)
class Fail:
    """The next passes fail, where that is named."""

    where: list[str]


@dataclass(frozen=True)
class Flush:
    """The cache is emptied, if nothing runs."""


Action: TypeAlias = Ask | Fork | Step | Drop | Fail | Flush

asks = st.builds(
    Ask,
    tokens,
    st.integers(0, 20),
    st.sampled_from([None, *GRAMMARS]),
    st.booleans(),
    st.none() | st.integers(-1, 20),
    st.integers(0, 1),
    st.sampled_from([None, None, "other"]),
    st.sampled_from([False, False, False, True]),
    st.integers(1, 3),
)
steps = st.builds(Step, st.integers(1, 6))
actions = st.one_of(
    asks,
    steps,
    steps,
    st.builds(Fork, st.integers(0, 100), asks),
    st.builds(Drop, st.integers(0, 100)),
    st.builds(Fail, st.lists(st.sampled_from(["launch", "outcome", ""]), min_size=1, max_size=3)),
    st.builds(Flush),
)


class Play:
    """A core, what was asked of it, and what came of that.

    Args:
        config: of the core.
        constraints: follow the grammars, which they know.
        compiler: says what these allow.
    """

    def __init__(
        self, config: ResolvedConfig, constraints: Constraints, compiler: GrammarCompiler
    ) -> None:
        self._limit = config.sequence_limit
        self._compiler = compiler
        self.runner = TokenRunner(config)
        self.core = EngineCore(config, self.runner, TOKENIZER, constraints)
        self._new: list[Request] = []
        self._cancelled: list[str] = []
        self._asked: dict[str, Request] = {}
        self._deltas: dict[str, list[Delta]] = {}
        self._dropped: set[str] = set()

    def act(self, number: int, action: Action) -> None:
        """Do one thing."""
        match action:
            case Ask():
                self._ask(action.requests(f"r{number}"))
            case Fork(which, asked):
                self._ask(asked.requests(f"r{number}", self._so_far(which)))
            case Step(times):
                for _ in range(times):
                    self.step()
            case Drop(which):
                running = sorted(set(self._asked) - self._ended())
                if running:
                    self._cancelled.append(running[which % len(running)])
            case Fail(where):
                self.runner.faults += where
            case Flush():
                now = self.core.statistics()
                assert self.core.clear_cache() == (now.running == 0)
                self.core.check()

    def step(self) -> None:
        """One step; it proves the books itself."""
        self._dropped.update(self._cancelled)
        for delta in self.core.step(self._new, self._cancelled):
            self._deltas[delta.request_id].append(delta)
        self._new, self._cancelled = [], []

    def drain(self) -> None:
        """Step to the end, after which nothing is left."""
        for _ in range(_STEPS):
            if not (self._new or self.core.busy):
                break
            self.step()
        now = self.core.statistics()
        assert (now.running, now.waiting, now.pages_held) == (0, 0, 0)
        assert self.core.clear_cache()
        assert self.core.statistics().pages_free == now.pages_total

    def check(self) -> None:
        """Every request has ended once, and as it should."""
        for name, request in self._asked.items():
            *before, last = self._deltas[name]
            assert all(delta.finish is None and delta.error is None for delta in before)
            length = len(request.prompt_ids) + (request.sampling.max_new_tokens > 0)
            if isinstance(last.error, PromptTooLong):
                assert length > self._limit
                continue
            if isinstance(last.error, StepFailed):
                assert {name} in self.runner.failed
                continue
            answer = joined([*before, last])
            assert answer.finish.reason != "abort" or name in self._dropped
            Expected(request, self._limit, self._compiler).check(answer)

    def _ask(self, requests: list[Request]) -> None:
        self._new += requests
        self._asked |= {request.request_id: request for request in requests}
        self._deltas |= {request.request_id: [] for request in requests}

    def _so_far(self, which: int) -> tuple[int, ...]:
        """The tokens of a request, and those of its answer."""
        if not self._asked:
            return ()
        name = sorted(self._asked)[which % len(self._asked)]
        made = [token for delta in self._deltas[name] for token in delta.token_ids]
        return (*self._asked[name].prompt_ids, *made)

    def _ended(self) -> set[str]:
        return {
            name
            for name, some in self._deltas.items()
            if some and (some[-1].finish is not None or some[-1].error is not None)
        }


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB)


@pytest.fixture(scope="module")
def constraints(compiler: GrammarCompiler) -> Iterator[Constraints]:
    """Those that know the grammars already, so that nobody waits for a thread."""
    made = Constraints(lambda: compiler)
    compiled = Semaphore(0)
    made.when_compiled(compiled.release)
    with closing(made):
        for grammar in GRAMMARS:
            made.compile(grammar)
            compiled.acquire()
        made.take_compiled()
        yield made


@given(
    script=st.lists(actions, max_size=40),
    page_size=st.sampled_from([1, 2, 4, 16]),
    pages=st.integers(5, 40),
    chunk=st.sampled_from([1, 3, 8, 64]),
    slots=st.integers(1, 6),
    shares=st.booleans(),
    ahead=st.booleans(),
)
def test_answers_are_those_of_tokens_drawn_one_by_one(
    constraints: Constraints,
    compiler: GrammarCompiler,
    script: list[Action],
    page_size: int,
    pages: int,
    chunk: int,
    slots: int,
    shares: bool,
    ahead: bool,
) -> None:
    sizes = resolved(page_size, pages, chunk, slots, shares, context=64)
    play = Play(replace(sizes, overlap=ahead), constraints, compiler)
    for number, action in enumerate(script):
        play.act(number, action)
    play.drain()
    play.check()


@pytest.mark.parametrize("where", ["launch", "outcome"])
@pytest.mark.parametrize("steps_before", range(12))
def test_a_pass_that_fails_loses_nothing_of_what_was_forced(
    constraints: Constraints, compiler: GrammarCompiler, where: str, steps_before: int
) -> None:
    """A forced token is told of by the pass under way, in which another was to be drawn."""
    sizes = replace(resolved(4, 40, 64, 6), overlap=True)
    play = Play(sizes, constraints, compiler)
    free = Ask([1, 2], 20, None, False, None, 0, None, no_cache=False, count=3)
    forced = replace(free, grammar=GRAMMARS[0], scored_from=0, count=1)
    play.act(0, free)
    play.act(1, forced)
    play.act(2, Step(steps_before))
    play.act(3, Fail([where]))
    play.drain()
    play.check()
    assert len(play.runner.failed) == 1
    assert play.core.statistics().failed == 0
