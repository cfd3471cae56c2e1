"""Forks: where branches start, what joins take over, how failures and cancellation spread."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsgl as sgl
from asyncsgl.testing import ScriptedBackend, last_text
from asyncsgl.types import GenRequest
from tests.frontend.conftest import Left

pytestmark = pytest.mark.anyio


def shout(request: GenRequest) -> str:
    """Answers with what was said last, in capitals."""
    return last_text(request).upper()


async def test_gather_gives_lists_in_the_branches_order() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> Any:
        s += sgl.user("go")
        async with s.fork(3) as branches:
            for i, branch in enumerate(branches):
                branch += sgl.user(f"part {i}")
                branch += sgl.assistant(sgl.gen("x"))
            branches[1].set("only", "one")
        return await s["x"], await s["only"]

    backend = ScriptedBackend(shout)
    state = await program.run(backend=backend)
    assert state["x"] == state.value("x") == ["PART 0", "PART 1", "PART 2"]
    assert state["only"] == [None, "one", None]
    assert state.return_value == (state["x"], state["only"])
    assert len(state.meta("x")) == 3
    assert state.meta("only")[0].error == "not set in this branch"
    assert state.messages() == [{"role": "user", "content": "go"}], "gathering adds no text"
    for i, request in enumerate(backend.requests):
        assert [m.text for m in request.messages] == ["go", f"part {i}", ""]


async def test_variables_from_before_the_fork_are_not_gathered() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s.set("before", 1)
        async with s.fork(2) as branches:
            for branch in branches:
                assert await branch["before"] == 1
                branch.set("after", 2)

    state = await program.run(backend=ScriptedBackend())
    assert state.variables == {"before": 1, "after": [2, 2]}


@given(st.lists(st.text("ab ", max_size=4), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_appending_joins_texts_in_order(texts: list[str], inside: bool, gens: bool) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> str:
        if inside:
            s += sgl.assistant_begin()
        s += "<"
        branches = s.fork(len(texts))
        for branch, text in zip(branches, texts, strict=True):
            branch += text
            if gens:
                branch += sgl.gen("x")
        await branches.join("concate_and_append")
        s += ">"
        text_so_far: str = await s.text()
        return text_so_far

    state = asyncio.run(program.run(backend=ScriptedBackend("!")))
    expected = "<" + "".join(text + "!" * gens for text in texts) + ">"
    assert state.return_value == ("ASSISTANT:" if inside else "") + expected


async def test_appended_turns_stay_turns() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        with s.assistant():
            s += "List: "
            branches = s.fork(2)
            for branch in branches:
                branch += "a" + sgl.assistant_end()
                branch += sgl.user("more?") + sgl.assistant_begin() + sgl.gen("x")
            await branches.join("concate_and_append")
            s += "!"

    state = await program.run(backend=ScriptedBackend("b"))
    assert [(m["role"], m["content"]) for m in state.messages()] == [
        ("assistant", "List: a"),
        ("user", "more?"),
        ("assistant", "ba"),
        ("user", "more?"),
        ("assistant", "b!"),
    ]


async def test_nested_forks_gather_nested_lists() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        async with s.fork(2) as outer:
            for i, branch in enumerate(outer):
                async with branch.fork(2) as inner:
                    for j, leaf in enumerate(inner):
                        leaf += f"{i}{j}" + sgl.gen("x")

    state = await program.run(backend=ScriptedBackend(shout))
    assert state["x"] == [["00", "01"], ["10", "11"]]


async def test_a_fork_inside_a_role_and_one_before_any_text() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        async with s.fork(2) as first:
            first += sgl.gen("empty")
        s += sgl.user("Name two.")
        with s.assistant():
            s += "They are "
            async with s.fork(2) as branches:
                branches += sgl.gen("x")

    backend = ScriptedBackend("a")
    state = await program.run(backend=backend)
    assert state["empty"] == state["x"] == ["a", "a"]
    assert [r.messages[-1].text for r in backend.requests] == ["", "", "They are ", "They are "]
    assert backend.requests[2].continue_assistant


async def test_copy_is_a_fork_of_one() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "a"
        async with s.copy() as copies:
            [copy] = copies
            copy += "b" + sgl.gen("x")

    state = await program.run(backend=ScriptedBackend(shout))
    assert (state["x"], state.text()) == (["AB"], "a")


async def test_children_start_from_the_parent_as_of_the_fork() -> None:
    first_asked, go = asyncio.Event(), asyncio.Event()

    async def answer(request: GenRequest) -> str:
        if last_text(request) == "one:":
            first_asked.set()
            await go.wait()
        return last_text(request).upper()

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "one:" + sgl.gen("slow")
        branches = s.fork(2)
        s += " parent only"
        branches += lambda i: f" child {i}:" + sgl.gen("x")
        await first_asked.wait()
        assert len(backend.requests) == 1, "the children wait for what was queued before them"
        go.set()
        await branches.join()

    backend = ScriptedBackend(answer)
    state = await program.run(backend=backend)
    assert state["x"] == ["ONE:ONE: CHILD 0:", "ONE:ONE: CHILD 1:"]
    assert state.text() == "one:ONE: parent only"


async def test_appending_to_all_by_list_function_and_expression() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        branches = s.fork(2)
        branches += ["a", "b"]
        branches += lambda i: str(i)
        branches += "!" + sgl.gen("x")
        branches[0] += "?"
        branches[-1] += sgl.gen("y")
        with pytest.raises(sgl.ProgramError, match="3 expressions for 2 branches"):
            branches += ["a", "b", "c"]
        with pytest.raises(sgl.ProgramError, match="cannot be replaced"):
            branches[0] = branches[1]
        await branches.join()

    state = await program.run(backend=ScriptedBackend(shout))
    assert state["x"] == ["A0!", "B1!"]
    assert state["y"] == [None, "B1!B1!"]


@pytest.mark.parametrize("mode", ["gather_variable", "concate_and_append"])
async def test_a_plain_def_program_forks_and_joins(mode: str) -> None:
    @sgl.function
    def program(s: sgl.ProgramState) -> None:
        s += "x"
        with s.fork(2) as branches:
            branches += sgl.gen("a")
            branches.join(mode)
        s += "y"

    state = await program.run(backend=ScriptedBackend("1"))
    appended = mode == "concate_and_append"
    assert state.text() == ("x11y" if appended else "xy")
    assert state.get("a") == (None if appended else ["1", "1"])


async def test_unjoined_branches_are_run_to_their_end() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s.fork(2).__iadd__(sgl.gen("x"))

    backend = ScriptedBackend("a")
    state = await program.run(backend=backend)
    assert len(backend.requests) == 2
    assert state.variables == {}
    assert state.usage.requests == 2


async def test_misuse_is_refused_at_the_line() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        for n in (0, -1, 1.5, True):
            with pytest.raises(sgl.InvalidArgument, match="at least 1"):
                s.fork(n)  # type: ignore[arg-type]
        branches = s.fork(1, position_ids_offset=[0])
        with pytest.raises(sgl.ProgramError, match="unknown join mode 'glue'"):
            branches.join("glue")
        await branches.join()
        with pytest.raises(sgl.ProgramError, match="joined already"):
            branches.join()
        with pytest.raises(sgl.ProgramError, match=r"branch \(0,\) is joined already"):
            branches += "late"
        with pytest.raises(sgl.ProgramError, match="joined already"):
            branches[0].fork(2)

    await program.run(backend=ScriptedBackend())


# -- failures ---------------------------------------------------------------------------


class Boom(Exception):
    pass


def failing_on(part: str, error: Exception) -> Any:
    async def answer(request: GenRequest) -> str | Exception:
        if part in last_text(request):
            return error
        await asyncio.Event().wait()
        raise AssertionError

    return answer


@pytest.mark.parametrize("how", ["with", "await", "unjoined"])
async def test_a_failing_branch_cancels_its_siblings(how: str, tasks_left: Left) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        branches = s.fork(3)
        branches += lambda i: f"{i}" + sgl.gen("x")
        if how == "with":
            async with branches:
                pass
        elif how == "await":
            await branches.join()

    error = Boom("no")
    backend = ScriptedBackend(failing_on("1", error))
    with pytest.raises(Boom) as caught:
        await program.run(backend=backend)
    assert caught.value is error
    assert (backend.running, backend.cancelled) == (0, 2)
    assert not tasks_left()


async def test_a_tolerant_join_keeps_the_error_in_its_place() -> None:
    error = Boom("no")

    def answer(request: GenRequest) -> str | Exception:
        return error if last_text(request) == "1" else "fine"

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        branches = s.fork(3)
        branches += lambda i: f"{i}" + sgl.gen("x")
        await branches.join(return_exceptions=True)
        s += sgl.gen("after")

    state = await program.run(backend=ScriptedBackend(answer))
    assert state["x"] == ["fine", error, "fine"]
    assert state["after"] == "fine"
    assert state.meta("x")[1].error == "no"
    assert state.to_dict()["variables"]["x"][1] == {"error": "Boom", "message": "no"}


@pytest.mark.parametrize("plain", [False, True])
async def test_an_inner_failure_ends_at_an_outer_tolerant_join(plain: bool) -> None:
    def body(s: sgl.ProgramState) -> Any:
        outer = s.fork(2)
        for i, branch in enumerate(outer):
            inner = branch.fork(2)
            inner += lambda j, i=i: f"{i}{j}" + sgl.gen("x")  # type: ignore[misc]
            inner.join()
        return outer.join(return_exceptions=True)

    @sgl.function
    async def waiting(s: sgl.ProgramState) -> None:
        await body(s)

    @sgl.function
    def queued(s: sgl.ProgramState) -> None:
        body(s)

    def answer(request: GenRequest) -> str | Exception:
        return Boom() if last_text(request) == "01" else "fine"

    program = queued if plain else waiting
    state = await program.run(backend=ScriptedBackend(answer))
    assert isinstance(state["x"][0], Boom)
    assert state["x"][1] == ["fine", "fine"]


async def test_an_unjoined_failing_branch_fails_the_run() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        async with s.fork(1) as outer:
            outer[0].fork(1).__iadd__(sgl.gen("x"))
            await outer.join(return_exceptions=True)

    with pytest.raises(Boom):
        await program.run(backend=ScriptedBackend(Boom()))


@pytest.mark.parametrize("pending", [False, True], ids=["at once", "behind a gen"])
async def test_a_body_that_fails_inside_the_with_gives_its_branches_up(pending: bool) -> None:
    async def answer(request: GenRequest) -> str:
        if "child" in last_text(request):
            await asyncio.Event().wait()
        return "fine"

    @sgl.function
    async def program(s: sgl.ProgramState) -> str:
        if pending:
            s += sgl.gen("before")
        branches = s.fork(2)
        with pytest.raises(Boom):  # noqa: PT012 - the body of the with is what fails
            async with branches:
                branches += "child" + sgl.gen("x")
                raise Boom
        text: str = await s.gen("after")
        with pytest.raises(sgl.ProgramError, match="was cancelled"):
            await branches[0]["x"]
        return text

    backend = ScriptedBackend(answer)
    state = await asyncio.wait_for(program.run(backend=backend), 5)
    assert state.return_value == "fine"
    assert backend.running == 0


async def test_what_is_queued_behind_a_failure_fails_with_it() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x")
        branches = s.fork(2)
        branches += sgl.gen("y")
        joined = branches.join()
        s += sgl.gen("z")
        for waiting in (s["x"], branches[0]["y"], joined, s["z"], s["y"]):
            with pytest.raises(Boom) as caught:
                await waiting
            assert caught.value is error

    error = Boom()
    backend = ScriptedBackend(error)
    with pytest.raises(Boom):
        await program.run(backend=backend)
    assert len(backend.requests) == 1


async def test_a_thousand_branches() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.user("Count.")
        async with s.fork(1000) as branches:
            branches += lambda i: sgl.user(f"{i}") + sgl.assistant(sgl.gen("x"))

    backend = ScriptedBackend(shout, delay=0.05)
    began = time.perf_counter()
    tracemalloc.start()
    try:
        state = await program.run(backend=backend)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert state["x"] == [f"{i}" for i in range(1000)]
    assert state.usage.requests == 1000
    assert peak < 1000 * 12_000, f"{peak / 1000:,.0f} bytes a branch"
    assert time.perf_counter() - began < 10, "they run side by side"


async def test_deep_nesting() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        inner = s
        for depth in range(60):
            [inner] = inner.fork(1)
            inner += f"{depth} "
        inner += sgl.gen("x")
        await inner["x"]

    state = await program.run(backend=ScriptedBackend(shout))
    assert state.usage.requests == 1
