"""What a body does with ``s``: turns, scopes, variables, text; and the finished state."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import pickle
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.testing import ScriptedBackend, last_text

pytestmark = pytest.mark.anyio


async def test_turns_by_calls_by_with_and_by_their_halves_are_the_same() -> None:
    @sgl.function
    async def by_calls(s: sgl.ProgramState) -> None:
        s += sgl.system("a") + sgl.user("b") + sgl.assistant("c" + sgl.gen("x"))

    @sgl.function
    async def by_with(s: sgl.ProgramState) -> None:
        with s.system():
            s += "a"
        with s.user():
            s += "b"
        with s.assistant():
            s += "c"
            s += sgl.gen("x")

    @sgl.function
    async def by_halves(s: sgl.ProgramState) -> None:
        s += sgl.system_begin() + "a" + sgl.system_end() + sgl.user_begin()
        s += ["b", sgl.user_end(), sgl.assistant_begin(), "c"]
        s += sgl.gen("x")
        s += sgl.assistant_end()

    expected = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "cd"},
    ]
    for program in (by_calls, by_with, by_halves):
        backend = ScriptedBackend("d")
        state = await program.run(backend=backend)
        assert state.messages() == expected
        [request] = backend.requests
        assert [m.text for m in request.messages] == ["a", "b", "c"]
        assert request.continue_assistant
        assert state.text() == "SYSTEM:a\nUSER:b\nASSISTANT:cd\n"


async def test_expressions_are_joined_in_any_order() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "a" + (sgl.gen("x") + ("b" + sgl.gen("y"))) + "c"
        s += ["d", ["e", sgl.gen("z")], ("f",)]

    state = await program.run(backend=ScriptedBackend(["1", "2", "3"]))
    assert state.text() == "a1b2cde3f"


MISUSE: list[tuple[Any, str]] = [
    (sgl.user(sgl.assistant("x")), "assistant cannot begin a turn inside the user turn"),
    (sgl.user_begin() + sgl.user_begin(), "cannot begin a turn inside the user turn"),
    (sgl.user_end(), "cannot end a user turn: no turn is open"),
    (sgl.user_begin() + sgl.assistant_end(), "the open turn is user's"),
    (sgl.user(sgl.gen("x")), r"gen\('x'\) stands in a user turn"),
    (sgl.system(sgl.select("x", ["a"])), r"select\('x'\) stands in a system turn"),
    (None, "cannot append NoneType"),
    (5, "cannot append int"),
    (["a", 5], "cannot append int"),
]


@pytest.mark.parametrize(("expr", "words"), MISUSE, ids=[words for _, words in MISUSE])
async def test_misuse_is_refused_at_the_line_and_queues_nothing(expr: Any, words: str) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "before"
        with pytest.raises(sgl.ProgramError, match=words):
            s += expr
        s += "after"

    backend = ScriptedBackend()
    state = await program.run(backend=backend)
    assert state.text() == "beforeafter"
    assert not backend.requests


async def test_a_role_in_a_with_of_another_is_refused_and_the_outer_turn_ends() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        with (
            pytest.raises(sgl.ProgramError, match="cannot begin a turn inside"),
            s.user(),
            s.assistant(),
        ):
            pass
        s += sgl.user("fine")

    state = await program.run(backend=ScriptedBackend())
    assert [m["content"] for m in state.messages()] == ["", "fine"]


async def test_a_scope_is_a_variable_of_the_text_in_it() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> Any:
        s += "0"
        with s.var_scope("all"):
            s += sgl.user("1")
            with s.var_scope("inner"):
                s += "2" + sgl.gen("x")
                s += sgl.user("3")
            with s.assistant():
                s += "4"
        s += "5"
        return await s["all"], await s["inner"]

    state = await program.run(backend=ScriptedBackend("x"))
    assert state.return_value == ("12x34", "2x3")
    assert (state["all"], state["inner"]) == ("12x34", "2x3")


async def test_a_scope_inside_a_turn_begins_in_its_middle() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        with s.assistant():
            s += "a"
            with s.var_scope("v"):
                s += "b" + sgl.gen("x")
            s += "c"

    assert (await program.run(backend=ScriptedBackend("!")))["v"] == "b!"


async def test_scopes_of_one_name_do_not_nest_and_need_one() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        with (
            s.var_scope("v"),
            pytest.raises(sgl.ProgramError, match="scope 'v' is open already"),
            s.var_scope("v"),
        ):
            pass
        with pytest.raises(sgl.InvalidArgument, match="non-empty"), s.var_scope(""):
            pass
        with s.var_scope("v"):
            s += "again"

    assert (await program.run(backend=ScriptedBackend()))["v"] == "again"


async def test_variables_of_the_bodys_own() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> list[str]:
        assert "x" not in s
        s.set("x", {"a": 1})
        s.set_var("y", "why")
        assert "x" in s
        assert await s["x"] == {"a": 1}
        assert await s.get_var("y") == "why"
        assert (await s.meta("x")).finish_reason is None
        assert (await s.get_meta_info("x")).finish_reason is None
        s += "Is " + s["y"]
        return list(s)

    state = await program.run(backend=ScriptedBackend())
    assert state.return_value == ["x", "y"]
    assert state.variables == {"x": {"a": 1}, "y": "why"}
    assert state.text() == "Is why"


async def test_an_unknown_variable_is_named_with_the_near_ones() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s.set("answer", "x")
        for read in (s.value, s.meta, s.__getitem__):
            with pytest.raises(sgl.UnknownVariable, match="did you mean 'answer'") as caught:
                read("anwser")
            assert isinstance(caught.value, KeyError)

    state = await program.run(backend=ScriptedBackend())
    with pytest.raises(sgl.UnknownVariable, match="did you mean 'answer'"):
        state["anwser"]
    assert (state.get("anwser"), state.get("anwser", 1), state.get("answer")) == (None, 1, "x")


async def test_text_and_messages_wait_for_what_is_queued() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> Any:
        s += sgl.user("a")
        s += sgl.assistant_begin() + "b" + sgl.gen("x")
        return await s.text(), await s.messages()

    state = await program.run(backend=ScriptedBackend("c", delay=0.01))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    assert state.return_value == ("USER:a\nASSISTANT:bc", turns)


async def test_sync_waits_for_everything_before_it() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x") + sgl.gen("y")
        await s.sync()
        assert str(s["x"]) + f"{s['y']:>3}" == "1  2"
        await s.sync()

    await program.run(backend=ScriptedBackend(["1", "2"], delay=0.01))


async def test_values_are_used_inline_before_they_are_known() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "Name:" + sgl.gen("name")
        s += " So " + s["name"] + " it is"
        s += [s["name"], "!"]
        s += sgl.user(s["name"])

    state = await program.run(backend=ScriptedBackend("Bo"))
    assert state.text() == "Name:Bo So Bo it isBo!USER:Bo\n"


async def test_a_pending_value_cannot_be_mistaken_for_its_text() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x")
        for use in (str, repr_of_equal, bool, lambda v: f"{v}", lambda v: v == v.name):
            with pytest.raises(sgl.ProgramError, match=r"await it first \(`await s\['x'\]`\)"):
                use(s["x"])
        with pytest.raises(AttributeError, match=r"no 'strip': await it"):
            s["x"].strip()
        await s["x"]
        assert s["x"] == "yes"
        assert s["x"] != "no"
        assert s["x"]

    await program.run(backend=ScriptedBackend("yes"))


def repr_of_equal(variable: object) -> str:
    return repr(variable == "yes")


async def test_a_variable_can_be_awaited_many_times_and_from_many_tasks() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> Any:
        async def read() -> str:
            text: str = await s["x"]
            return text

        s += sgl.gen("x")
        return await asyncio.gather(*(read() for _ in range(10))), await s["x"], await s["x"]

    state = await program.run(backend=ScriptedBackend("a"))
    assert state.return_value == (["a"] * 10, "a", "a")


async def test_reading_one_variable_does_not_wait_for_later_ones() -> None:
    go = asyncio.Event()

    async def answer(request: Any) -> str:
        if last_text(request) == "first":
            return "1"
        await go.wait()
        return "2"

    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += "first" + sgl.gen("x")
        s += sgl.gen("y")
        assert await s["x"] == "1"
        go.set()

    state = await program.run(backend=ScriptedBackend(answer))
    assert (state["x"], state["y"]) == ("1", "2")


async def test_text_without_anything_pending_is_applied_without_a_task(tasks_left: Any) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.user("a") + "b"
        s.fork(2).__iadd__("c")
        assert not tasks_left()

    await program.run(backend=ScriptedBackend())


async def test_the_meta_of_a_variable() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> Any:
        s += "one two" + sgl.gen("x", stop="!")
        return await s.meta("x")

    backend = ScriptedBackend("yes it is! really")
    state = await program.run(backend=backend)
    meta = state.meta("x")
    assert meta == state.return_value == state.get_meta_info("x")
    assert (meta.finish_reason, meta.matched_stop) == ("stop", "!")
    assert (meta.prompt_tokens, meta.completion_tokens, meta.cached_tokens) == (2, 3, 0)
    assert meta.request_id == backend.requests[0].request_id
    assert (state.usage.prompt_tokens, state.usage.total_tokens, state.usage.requests) == (2, 5, 1)


class Kind(enum.Enum):
    A = "a"


@dataclasses.dataclass
class Holder:
    kind: Kind
    many: tuple[int, ...]


@sgl.function
async def rich(s: sgl.ProgramState) -> Holder:
    s += "raw" + sgl.user("hi") + sgl.assistant(sgl.gen("x", n=2))
    s += sgl.select("c", ["a", "b"])
    async with s.fork(2) as branches:
        branches += sgl.gen("y")
    s.set("odd", {1: object})
    return Holder(Kind.A, (1, 2))


async def test_the_finished_state_is_plain_data() -> None:
    state = await rich.run(backend=ScriptedBackend("t", scores={"b": -1.0}))
    again = pickle.loads(pickle.dumps(state))
    assert again.variables == state.variables
    assert again.text() == state.text()
    assert again.to_dict() == state.to_dict()
    assert again.meta("c") == state.meta("c")
    assert again.return_value == Holder(Kind.A, (1, 2))
    data = json.loads(json.dumps(state.to_dict()))
    assert data["variables"]["x"] == ["t", "t"]
    assert data["variables"]["y"] == ["t", "t"]
    assert data["return_value"] == {"kind": "a", "many": [1, 2]}
    assert data["messages"][0] == {"role": "user", "content": "hi"}
    assert data["meta"]["c"]["choice_scores"] == [-10.0, -1.0]
    assert data["usage"]["requests"] == 4
    assert data["run_id"] == state.run_id
    assert (len(state), list(state), "x" in state) == (4, ["x", "c", "y", "odd"], True)


async def test_names_of_sglangs_frontend_on_the_finished_state() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> int:
        s += sgl.gen("x")
        return 5

    state = await program.run(backend=ScriptedBackend("t"))
    state.sync()
    state.set_var("y", 1)
    assert (state.get_var("x"), state["y"], state.ret_value) == ("t", 1, 5)
    assert state.error() is None  # type: ignore[func-returns-value]


async def test_chat_only_roles_reach_the_request_in_order() -> None:
    @sgl.function
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.user("q") + sgl.assistant("no gen here")
        s += sgl.gen("raw")

    backend = ScriptedBackend("x")
    await program.run(backend=backend)
    [request] = backend.requests
    assert [(m.role, m.text) for m in request.messages] == [
        ("user", "q"),
        ("assistant", "no gen here"),
        (None, ""),
    ]
    assert not request.continue_assistant


async def test_a_plain_def_program_appends_but_cannot_read() -> None:
    @sgl.function
    def program(s: sgl.ProgramState) -> str:
        s += "a" + sgl.gen("x")
        s.set("known", "k")
        assert s["known"] == "k"
        s += s["x"] + s["known"]
        for read in (
            lambda: str(s["x"]),
            lambda: s["x"] == "1",
            lambda: f"{s['x']}",
            lambda: bool(s["x"]),
        ):
            with pytest.raises(sgl.ProgramError, match=r"'x' is not generated yet.*`async def`"):
                read()
        for wait in (s.text, s.messages, s.sync, lambda: s.meta("x"), lambda: s.value("x")):
            with pytest.raises(sgl.ProgramError, match=r"asyncsgl\.sync"):
                wait()
        return "done"

    state = await program.run(backend=ScriptedBackend("1"))
    assert (state.text(), state.return_value) == ("a11k", "done")
