"""Requests wait for their grammars while others run."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from asyncsgl_engine.attention import TorchAttention
from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.constraints import Constraints
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.errors import Closed, InvalidRequest
from asyncsgl_engine.grammar import CompiledGrammar, GrammarCompiler
from asyncsgl_engine.request import Delta, Grammar, Request, Sampling
from asyncsgl_engine.tokenizer import Tokenizer
from tests.engine.conftest import byte_tokenizer
from tests.engine.direct import core_for

pytestmark = pytest.mark.timeout(60)

GREEDY = Sampling(max_new_tokens=400, temperature=0.0, ignore_eos=True)
WORDS = Grammar("regex", "(yes|no)")


class Gate:
    """Compilers that are made once a gate opens, and that count what they compile."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.compiled: list[Grammar] = []

    def make(self) -> GrammarCompiler:
        compiled, opened = self.compiled, self.open

        class Counting(GrammarCompiler):
            def compile(self, grammar: Grammar) -> CompiledGrammar:
                assert opened.wait(30)
                compiled.append(grammar)
                return super().compile(grammar)

        return Counting(Tokenizer(byte_tokenizer()), 300, num_threads=1)


@contextmanager
def gated(folder: Path) -> Iterator[tuple[EngineCore, Gate]]:
    """A core whose grammars are compiled once a gate is open."""
    gate = Gate()
    constraints = Constraints(gate.make)
    config = EngineConfig(
        str(folder), dtype="float32", device="cpu", max_total_tokens=4000, debug_check=True
    )
    try:
        yield core_for(config, TorchAttention(), constraints=constraints), gate
    finally:
        gate.open.set()
        constraints.close()


def constrained(name: str, grammar: Grammar = WORDS) -> Request:
    return Request(name, (1, 2, 3), replace(GREEDY, max_new_tokens=40), grammar)


def run_out(core: EngineCore, before: Iterable[Delta] = ()) -> dict[str, list[Delta]]:
    """Step until all have ended; gives these deltas and all that came before."""
    deltas: dict[str, list[Delta]] = {}
    made = list(before)
    while made or core.busy:
        for delta in made:
            deltas.setdefault(delta.request_id, []).append(delta)
        made = core.step()
    return deltas


def test_others_run_while_a_grammar_is_compiled(model_folder: Callable[[str], Path]) -> None:
    with gated(model_folder("llama")) as (core, gate):
        core.step([Request("free", (5, 6), GREEDY, stream=True), constrained("bound")])
        for _ in range(20):
            (delta,) = core.step()
            assert delta.request_id == "free"
        now = core.statistics()
        assert (now.running, now.waiting, now.compiling) == (1, 1, 1)
        gate.open.set()
        deltas = run_out(core)
        assert deltas["bound"][-1].text in ("yes", "no")
        now = core.statistics()
        assert (now.finished, now.waiting, now.compiling) == (2, 0, 0)


def test_nothing_is_computed_while_all_wait(model_folder: Callable[[str], Path]) -> None:
    with gated(model_folder("llama")) as (core, gate):
        assert core.step([constrained("bound")]) == []
        assert (core.busy, core.can_step, core.statistics().steps) == (True, False, 0)
        gate.open.set()
        assert run_out(core)["bound"][-1].finish is not None
        assert not core.can_step


def test_a_request_may_be_cancelled_while_it_waits(model_folder: Callable[[str], Path]) -> None:
    with gated(model_folder("llama")) as (core, gate):
        core.step([constrained("one"), constrained("two")])
        (delta,) = core.step(cancelled=["one"])
        assert delta.finish is not None
        assert (delta.request_id, delta.finish.reason, delta.token_ids) == ("one", "abort", ())
        assert core.statistics().aborted == 1
        (refused,) = core.step([constrained("two")])
        assert "in use" in str(refused.error)
        assert core.step([constrained("one", Grammar("regex", "b"))]) == []
        gate.open.set()
        deltas = run_out(core)
        assert deltas["one"][-1].text == "b"
        assert deltas["two"][-1].text in ("yes", "no")


def test_what_nobody_waits_for_is_not_compiled(model_folder: Callable[[str], Path]) -> None:
    with gated(model_folder("llama")) as (core, gate):
        patterns = [Grammar("regex", f"a{{{count}}}") for count in range(1, 9)]
        requests = [constrained(f"r{n}", grammar) for n, grammar in enumerate(patterns)]
        core.step(requests)
        core.step(cancelled=[request.request_id for request in requests[2:]])
        gate.open.set()
        assert len(run_out(core)) == 2
        # Two threads had begun with the first two.
        assert sorted(g.source for g in gate.compiled) == ["a{1}", "a{2}"]


def test_a_grammar_that_many_want_is_compiled_once(model_folder: Callable[[str], Path]) -> None:
    with gated(model_folder("llama")) as (core, gate):
        core.step([constrained(f"r{n}") for n in range(25)])
        core.step([constrained(f"s{n}") for n in range(25)])
        gate.open.set()
        assert len(run_out(core)) == 50
        core.step([constrained("late")])
        assert core.statistics().compiling == 0, "what is known waits for nothing"
        run_out(core)
        assert gate.compiled == [WORDS]


def test_a_faulty_grammar_ends_only_its_own_request(model_folder: Callable[[str], Path]) -> None:
    schema = {"properties": {"tags": {"items": {"type": "text"}}}}
    bad = constrained("bad", Grammar("json_schema", json.dumps(schema)))
    with gated(model_folder("llama")) as (core, gate):
        gate.open.set()
        first = core.step([*(constrained(f"r{n}") for n in range(9)), bad])
        deltas = run_out(core, first)
        error = deltas.pop("bad")[-1].error
        assert isinstance(error, InvalidRequest)
        assert "json_schema: at #/properties/tags/items: Invalid type: text" in str(error)
        assert len(deltas) == 9
        assert all(each[-1].finish is not None for each in deltas.values())
        assert core.statistics().failed == 1


def test_ending_everything_ends_those_who_wait(model_folder: Callable[[str], Path]) -> None:
    with gated(model_folder("llama")) as (core, _):
        core.step([constrained("bound"), Request("free", (1,), GREEDY)])
        deltas = core.fail_all(Closed("over"))
        assert {delta.request_id for delta in deltas} == {"bound", "free"}
        assert not core.busy
        assert core.statistics().failed == 2
