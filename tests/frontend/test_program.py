"""``@function``: arguments, binding, running one row and many."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.testing import ScriptedBackend, last_text
from tests.frontend.conftest import Left

pytestmark = pytest.mark.anyio


@sgl.function
async def greet(s: sgl.ProgramState, name: str, tone: str = "kind") -> str:
    """Greets."""
    s += f"{tone} {name}:" + sgl.gen("x")
    return f"{name}/{tone}"


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend("hi")


async def test_arguments_by_name_by_position_and_by_default(backend: ScriptedBackend) -> None:
    assert (await greet.run(name="a", backend=backend)).return_value == "a/kind"
    assert (await greet.run("a", "dry", backend=backend)).return_value == "a/dry"
    assert (await greet.run("a", tone="dry", backend=backend)).return_value == "a/dry"
    assert (await greet("a", backend=backend)).return_value == "a/kind"
    assert (greet.name, greet.__doc__) == ("greet", "Greets.")
    assert repr(greet).startswith("<Program greet(name")


async def test_binding_fixes_arguments(backend: ScriptedBackend) -> None:
    dry = greet.bind(tone="dry")
    assert (await dry.run(name="a", backend=backend)).return_value == "a/dry"
    assert (await dry.bind(name="b")(backend=backend)).return_value == "b/dry"
    assert (await dry.run(name="a", tone="new", backend=backend)).return_value == "a/new"
    assert (await greet.run(name="a", backend=backend)).return_value == "a/kind"
    with pytest.raises(sgl.InvalidArgument, match="unknown to greet"):
        greet.bind(nme="x")


@pytest.mark.parametrize(
    ("args", "arguments", "field", "words"),
    [
        ((), {}, "name", r"missing arguments of greet\(\)"),
        ((), {"nme": "a"}, "nme", "its arguments are: name, tone"),
        (("a",), {"name": "b"}, "name", "given twice"),
        (("a", "b", "c"), {}, "*args", "3 are too many"),
    ],
)
async def test_wrong_arguments_are_named(
    args: tuple[str, ...],
    arguments: dict[str, str],
    field: str,
    words: str,
    backend: ScriptedBackend,
) -> None:
    with pytest.raises(sgl.InvalidArgument, match=words) as caught:
        await greet.run(*args, **arguments, backend=backend)
    assert caught.value.field == field
    assert not backend.requests


async def test_an_argument_named_like_a_sampling_field_is_the_programs(
    backend: ScriptedBackend,
) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState, temperature: str, n: int = 3) -> Any:
        s += sgl.gen("x")
        return temperature, n

    state = await program.run(temperature="warm", top_p=0.5, backend=backend)
    assert state.return_value == ("warm", 3)
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.n, sampling.top_p) == (None, None, 0.5)
    [state] = await program.run_batch([{"temperature": "cold"}], temperature=0.5, backend=backend)
    assert state.return_value == ("cold", 3)
    assert backend.requests[1].sampling.temperature == 0.5


async def test_a_program_may_take_any_keyword(backend: ScriptedBackend) -> None:
    @sgl.function
    async def program(s: sgl.ProgramState, first: int, **rest: object) -> Any:
        s += sgl.gen("x")
        return first, rest

    state = await program.run(1, other=2, max_tokens=5, backend=backend)
    assert state.return_value == (1, {"other": 2})
    assert backend.requests[0].sampling.max_tokens == 5
    with pytest.raises(sgl.InvalidArgument, match="2 are too many"):
        await program.run(1, 2, backend=backend)


def test_a_function_needs_a_state_and_named_parameters() -> None:
    with pytest.raises(sgl.ProgramError, match="first parameter for its state"):
        sgl.function(lambda: None)
    with pytest.raises(
        sgl.ProgramError, match=r"'\*more' of the program .* cannot be given by name"
    ):
        sgl.function(lambda s, *more: None)  # noqa: ARG005
    with pytest.raises(sgl.ProgramError, match=r"'x' of the program .* cannot be given by name"):
        sgl.function(lambda s, x, /: None)  # noqa: ARG005


def test_checking_arguments_without_running() -> None:
    greet.check_arguments({"name": "a"})
    with pytest.raises(sgl.InvalidArgument, match="missing"):
        greet.check_arguments({})


async def test_a_decorator_with_arguments(backend: ScriptedBackend) -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def program(s: sgl.ProgramState) -> None:
        s += sgl.gen("x")

    assert program.num_api_spec_tokens == 64
    assert program.bind().num_api_spec_tokens == 64
    assert (await program.run(backend=backend))["x"] == "hi"


# -- many rows --------------------------------------------------------------------------------

ROWS = [{"name": str(i)} for i in range(20)]


async def test_a_batch_gives_the_states_in_the_order_of_the_rows(tasks_left: Left) -> None:
    async def answer(request: Any) -> str:
        await asyncio.sleep(0.001 * (hash(last_text(request)) % 5))
        return last_text(request)

    backend = ScriptedBackend(answer)
    states = await greet.run_batch(ROWS, num_threads=4, backend=backend)
    assert [state["x"] for state in states] == [f"kind {i}:" for i in range(20)]
    assert not tasks_left()
    assert await greet.run_batch([], backend=backend) == []


async def test_never_more_at_once_than_asked_for() -> None:
    seen: list[int] = []

    def answer(request: Any) -> str:
        seen.append(scripted.running)
        return "x"

    scripted = ScriptedBackend(answer, delay=0.001)
    await greet.run_batch(ROWS, num_threads=3, backend=scripted)
    assert max(seen) == 3
    for threads in (0, -1, 1.5, True, "many"):
        with pytest.raises(sgl.InvalidArgument, match="num_threads"):
            await greet.run_batch(ROWS, num_threads=threads, backend=scripted)  # type: ignore[arg-type]


def failing_on_odd(request: Any) -> str | Exception:
    number = int(last_text(request).split()[1][:-1])
    return LookupError(f"row {number}") if number % 2 else "fine"


async def test_failing_rows_lose_nothing() -> None:
    backend = ScriptedBackend(failing_on_odd)
    with pytest.raises(sgl.BatchError, match=r"10 of 20 rows failed.*row 1") as caught:
        await greet.run_batch(ROWS, backend=backend)
    results = caught.value.results
    assert isinstance(caught.value.__cause__, LookupError)
    assert [isinstance(result, LookupError) for result in results] == [False, True] * 10
    again = await greet.run_batch(ROWS, backend=backend, return_exceptions=True)
    assert [type(result) for result in again] == [sgl.State, LookupError] * 10
    assert isinstance(again[1].state, sgl.State)


async def test_a_wrong_row_fails_alone() -> None:
    rows: list[Any] = [{"name": "a"}, {"nme": "b"}, {}, "c"]
    results = await greet.run_batch(rows, backend=ScriptedBackend("x"), return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds[:3] == [sgl.State, sgl.InvalidArgument, sgl.InvalidArgument]
    assert issubclass(kinds[3], (TypeError, sgl.InvalidArgument))


async def test_a_sampling_keyword_of_a_batch_must_be_one(backend: ScriptedBackend) -> None:
    with pytest.raises(sgl.InvalidArgument, match="arguments belong in the rows"):
        await greet.run_batch(ROWS, name="x", backend=backend)


async def test_outcomes_come_as_they_are_ready(tasks_left: Left) -> None:
    async def answer(request: Any) -> str:
        if " 0:" in last_text(request):
            await released.wait()
        return "x"

    released = asyncio.Event()
    backend = ScriptedBackend(answer)
    order = []
    async with aclosing(greet.iter_batch(ROWS[:4], num_threads=2, backend=backend)) as outcomes:
        async for outcome in outcomes:
            order.append(outcome.index)
            if len(order) == 3:
                released.set()
    assert order == [1, 2, 3, 0]
    ordered = greet.iter_batch(ROWS, num_threads=4, ordered=True, backend=backend)
    assert [outcome.index async for outcome in ordered] == list(range(20))
    assert not tasks_left()


async def test_rows_are_taken_as_they_are_needed(tasks_left: Left) -> None:
    taken = 0

    def rows() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield {"name": str(taken)}

    outcomes = greet.iter_batch(rows(), num_threads=2, backend=ScriptedBackend("x"))
    async with aclosing(outcomes):
        async for outcome in outcomes:
            if outcome.index > 50:
                break
    assert taken < 70
    assert not tasks_left()
