"""Errors: the original object, everywhere, with the unfinished state; and they can be pickled."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl import errors
from asyncsgl.backends.base import FEATURES
from asyncsgl.testing import ScriptedBackend
from tests.frontend.conftest import Left

pytestmark = pytest.mark.anyio


async def test_the_original_error_is_raised_at_every_await_and_by_the_run(tasks_left: Left) -> None:
    error = sgl.RateLimitError("slow down", backend="b", status=429)

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.user("q") + sgl.assistant("a " + sgl.gen("first"))
        s += sgl.gen("second") + sgl.gen("third")
        waits: list[Callable[[], Any]] = [s.sync, s.text, s.messages]
        waits += [lambda: s["second"], lambda: s["third"]]
        for wait in waits:
            with pytest.raises(sgl.RateLimitError) as caught:
                await wait()
            assert caught.value is error
        for ask in (s.meta, s.value):
            with pytest.raises(sgl.RateLimitError) as caught:
                await ask("second")
            assert caught.value is error
        s += sgl.gen("late")
        with pytest.raises(sgl.RateLimitError):
            await s["late"]

    backend = ScriptedBackend(["fine", error])
    with pytest.raises(sgl.RateLimitError) as raised:
        await program.run(backend=backend)
    assert raised.value is error
    state = error.state
    assert isinstance(state, sgl.State)
    assert state.variables == {"first": "fine"}
    assert state.messages()[1] == {"role": "assistant", "content": "a fine"}
    assert state.usage.requests == 1
    assert len(backend.requests) == 2
    assert not tasks_left()


@pytest.mark.parametrize(
    "error", [KeyError("k"), ZeroDivisionError(), ExceptionGroup("g", [OSError()])]
)
async def test_an_error_of_the_body_comes_out_as_it_is(error: Exception, tasks_left: Left) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "so far" + sgl.gen("x")
        s.set("y", 1)
        raise error

    backend = ScriptedBackend(delay=600)
    with pytest.raises(type(error)) as caught:
        await program.run(backend=backend)
    assert caught.value is error
    assert caught.value.state["y"] == 1  # type: ignore[attr-defined]
    assert caught.value.state.text() == "so far"  # type: ignore[attr-defined]
    assert not tasks_left()
    assert backend.running == 0


class Slotted(Exception):
    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        if name == "state":
            raise AttributeError(name)
        super().__setattr__(name, value)


async def test_an_error_that_takes_no_attributes_gets_a_note() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s.set("y", 1)
        raise Slotted

    with pytest.raises(Slotted) as caught:
        await program.run(backend=ScriptedBackend())
    assert "{'y': 1}" in caught.value.__notes__[0]


async def test_a_caught_failure_still_fails_the_run() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        with pytest.raises(LookupError):
            await s.gen("x")

    with pytest.raises(LookupError):
        await program.run(backend=ScriptedBackend(LookupError()))


async def test_a_failure_can_be_survived_in_a_branch() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> str:
        s += "a"
        branches = s.fork(1)
        branches += sgl.gen("x")
        await branches.join(return_exceptions=True)
        [answer] = await s["x"]
        return "instead" if isinstance(answer, Exception) else "answered"

    state = await program.run(backend=ScriptedBackend(LookupError()))
    assert state.return_value == "instead"


async def test_unsupported_features_are_refused_before_anything_is_sent() -> None:
    can = sgl.Capabilities(frozenset(FEATURES) - {"regex", "select"}, hints={"regex": "use dtype"})
    backend = ScriptedBackend("x", capabilities=can)

    @sgl.function
    async def constrained(s: sgl.ProgramState) -> None:
        s += sgl.gen("x", regex="a+")

    @sgl.function
    async def choosing(s: sgl.ProgramState) -> None:
        s += sgl.select("x", ["a"])

    with pytest.raises(sgl.UnsupportedFeature, match="scripted does not support regex: use dtype"):
        await constrained.run(backend=backend)
    with pytest.raises(sgl.UnsupportedFeature, match="does not support select"):
        await choosing.run(backend=backend)
    assert not backend.requests


async def test_a_rule_that_fails_fails_the_run() -> None:
    class Broken:
        unconditional = False

        def __call__(self, choices: object) -> object:
            raise ArithmeticError("no rule")

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.select("x", ["a"], choices_method=Broken())  # type: ignore[arg-type]

    with pytest.raises(ArithmeticError, match="no rule"):
        await program.run(backend=ScriptedBackend())


async def test_a_failing_run_does_not_ask_the_backend_for_its_template() -> None:
    class Down(ScriptedBackend):
        async def chat_template_in_use(self) -> sgl.ChatTemplate:
            raise sgl.BackendConnectionError("down as well")

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "a" + sgl.gen("x")

    with pytest.raises(sgl.OverloadedError) as caught:
        await program.run(backend=Down(sgl.OverloadedError("busy")))
    assert isinstance(caught.value.state, sgl.State)
    assert caught.value.state.text() == "a"


# -- the default backend --------------------------------------------------------------------


@sgl.function
async def ask(s: sgl.ProgramState) -> None:
    s += sgl.gen("x")


async def test_without_a_backend_the_error_says_how_to_set_one() -> None:
    assert sgl.get_default_backend() is None
    with pytest.raises(sgl.UsageError, match="set_default_backend"):
        await ask.run()
    with pytest.raises(sgl.UsageError, match="not a backend: 'x'"):
        await ask.run(backend="x")  # type: ignore[arg-type]
    with pytest.raises(sgl.UsageError, match="not a backend"):
        sgl.set_default_backend("x")  # type: ignore[arg-type]


async def test_the_default_backend_is_the_contexts_or_the_processes() -> None:
    process, context, other = ScriptedBackend("p"), ScriptedBackend("c"), ScriptedBackend("o")
    sgl.set_default_backend(process)
    try:
        assert (await ask.run())["x"] == "p"
        with sgl.use_backend(context):
            assert (await ask.run())["x"] == "c"
            assert (await ask.run(backend=other))["x"] == "o"
            assert (await asyncio.create_task(ask.run()))["x"] == "c"
            assert await asyncio.to_thread(sgl.get_default_backend) is context
            with sgl.use_backend(other):
                assert sgl.get_default_backend() is other
            [state] = await ask.run_batch([{}])
            assert state["x"] == "c"
        assert (await ask.run())["x"] == "p"
    finally:
        sgl.set_default_backend(None)
    assert sgl.get_default_backend() is None


async def test_contexts_side_by_side_do_not_see_each_other() -> None:
    async def in_context(name: str) -> str:
        with sgl.use_backend(ScriptedBackend(name, delay=0.005)):
            await asyncio.sleep(0)
            text: str = (await ask.run())["x"]
            return text

    names = [f"{i}" for i in range(10)]
    assert await asyncio.gather(*map(in_context, names)) == names


# -- the classes ------------------------------------------------------------------------------

EXAMPLES: dict[type[errors.AsyncSGLError], errors.AsyncSGLError] = {
    errors.InvalidArgument: errors.InvalidArgument("n", "must be 1"),
    errors.UnknownVariable: errors.UnknownVariable("x", ["y", "z"]),
    errors.UnsupportedFeature: errors.UnsupportedFeature("b", "f", "hint"),
    errors.MissingDependency: errors.MissingDependency("av", "video"),
    errors.BatchError: errors.BatchError("bad", results=[1, ValueError("x")]),
}
CLASSES = [getattr(errors, name) for name in errors.__all__]


def example(kind: type[errors.AsyncSGLError]) -> errors.AsyncSGLError:
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    if issubclass(kind, errors.BackendError):
        return kind("no", backend="b", request_id="r", status=500, retry_after=1.5)
    return kind("no")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_survives_pickling_with_its_state(kind: type[errors.AsyncSGLError]) -> None:
    error = example(kind)
    error.state = asyncio.run(ask.run(backend=ScriptedBackend("t")))
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert repr(again) == repr(error)
    assert isinstance(again.state, sgl.State)
    assert again.state["x"] == "t"
    assert again.__notes__ == ["a note"]
    plain = {name: value for name, value in vars(error).items() if name not in ("state", "results")}
    assert {name: vars(again)[name] for name in plain} == plain


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_documented_and_in_the_tree(kind: type[errors.AsyncSGLError]) -> None:
    assert inspect.getdoc(kind)
    assert kind.__name__ in (errors.__doc__ or "")
    assert issubclass(kind, errors.AsyncSGLError)


def test_errors_are_also_the_builtin_kinds_that_callers_expect() -> None:
    assert issubclass(sgl.InvalidArgument, ValueError)
    assert issubclass(sgl.UnknownVariable, KeyError)
    assert issubclass(sgl.MissingDependency, ImportError)
    assert issubclass(sgl.BackendTimeout, TimeoutError)
    error = sgl.OverloadedError("busy", backend="b", request_id="r", status=503)
    assert str(error) == "busy (b, status 503, request r)"
