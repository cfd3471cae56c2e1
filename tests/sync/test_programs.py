"""Blocking programs: plain functions that read as they go, streams, batches, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import asyncsgl
import asyncsgl.sync as sgl
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import GenRequest


def echo(request: GenRequest) -> str:
    """Answers with what the last user said."""
    said = [message.text for message in request.messages if message.role == "user"]
    return f"echo {said[-1]}"


def program_threads() -> list[str]:
    """The threads of programs that do not end although their runs have ended."""
    threads = [thread for thread in threading.enumerate() if thread.name == "asyncsgl-program"]
    for thread in threads:
        thread.join(5)
    return [thread.name for thread in threads if thread.is_alive()]


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    made = ScriptedBackend(echo, chunk_size=3)
    yield made
    assert made.running == 0
    assert program_threads() == []


@sgl.function
def tell(s: Any, question: str) -> Any:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=16))
    s += sgl.user("Once more: " + s["answer"])
    s += sgl.assistant(sgl.gen("again"))
    return s["answer"].upper()


def test_reading_in_a_plain_function_waits_for_the_text(backend: ScriptedBackend) -> None:
    state = tell.run(question="hello", backend=backend)
    assert state["answer"] == "echo hello"
    assert state["again"] == "echo Once more: echo hello"
    assert state.return_value == state.ret_value == "ECHO HELLO"
    assert state.get_var("answer") == "echo hello"
    assert state.get_meta_info("answer").finish_reason == "stop"


def test_forks_join_in_a_plain_function(backend: ScriptedBackend) -> None:
    @sgl.function
    def advise(s: Any, topic: str) -> Any:
        s += sgl.system("Be brief.")
        forks = s.fork(2)
        forks += lambda i: sgl.user(f"{topic} {i}")
        for fork in forks:
            fork += sgl.assistant(sgl.gen("tip"))
        assert forks[1]["tip"] == f"echo {topic} 1"
        forks.join()
        s += sgl.user("All: " + ", ".join(s["tip"]))
        s += sgl.assistant(sgl.gen("sum"))

    state = advise.run(topic="tea", backend=backend)
    assert state["tip"] == ["echo tea 0", "echo tea 1"]
    assert state["sum"] == "echo All: echo tea 0, echo tea 1"


def test_coroutine_programs_run_too(backend: ScriptedBackend) -> None:
    @sgl.function
    async def ask(s: Any, question: str) -> Any:
        s += sgl.user(question)
        with s.assistant():
            return await s.gen("answer")

    assert ask(question="x", backend=backend).return_value == "echo x"


def test_programs_of_the_async_api_can_be_made_blocking(backend: ScriptedBackend) -> None:
    @asyncsgl.function
    async def ask(s: Any, question: str) -> Any:
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen("answer"))

    assert sgl.function(ask).run(question="x", backend=backend)["answer"] == "echo x"


def test_text_iter_gives_the_text_in_pieces(backend: ScriptedBackend) -> None:
    state = tell.run(question="hello", backend=backend, stream=True)
    assert "".join(state.text_iter("answer")) == "echo hello"
    assert state["again"] == "echo Once more: echo hello"
    assert state.error() is None
    assert state.ret_value == "ECHO HELLO"
    assert state.text().startswith("USER:hello\n")


def test_text_iter_without_a_name_gives_the_programs_own_text_too(
    backend: ScriptedBackend,
) -> None:
    state = tell(question="hi", backend=backend, stream=True)
    assert "".join(state.text_iter()) == "hiecho hiOnce more: echo hiecho Once more: echo hi"


def test_text_async_iter_leaves_the_callers_loop_free(backend: ScriptedBackend) -> None:
    async def main() -> tuple[str, object]:
        state = tell.run(question="hello", backend=backend, stream=True)
        pieces = [pair async for pair in state.text_async_iter("answer", return_meta_data=True)]
        state.sync()
        return "".join(piece for piece, _ in pieces), pieces[-1][1].finish_reason

    assert asyncio.run(main()) == ("echo hello", "stop")


def test_leaving_a_stream_early_cancels_the_run() -> None:
    backend = ScriptedBackend("one two three", chunk_size=3, chunk_delay=0.01)
    with tell.run(question="x", backend=backend, stream=True) as state:
        assert next(state.text_iter("answer")) == "one"
    assert backend.statistics() == {"requests": 1, "running": 0, "cancelled": 1}
    assert program_threads() == []


def test_batches_in_a_list_and_as_a_generator(backend: ScriptedBackend) -> None:
    rows = [{"question": str(number)} for number in range(20)]
    states = tell.run_batch(rows, backend=backend, num_threads=4)
    assert [state["answer"] for state in states] == [f"echo {number}" for number in range(20)]
    generator = tell.run_batch(iter(rows), backend=backend, num_threads=4, generator_style=True)
    assert [state["answer"] for state in generator] == [f"echo {number}" for number in range(20)]


def test_a_generator_that_is_left_early_stops_the_batch() -> None:
    backend = ScriptedBackend(echo, delay=0.01)
    rows = ({"question": str(number)} for number in range(10_000))
    generator = tell.run_batch(rows, backend=backend, num_threads=2, generator_style=True)
    assert next(generator)["answer"] == "echo 0"
    generator.close()
    assert backend.running == 0
    assert len(backend.requests) < 100


def test_errors_are_raised_and_not_kept(backend: ScriptedBackend) -> None:
    failing = ScriptedBackend([ConnectionError("away")])
    with pytest.raises(ConnectionError, match="away") as caught:
        tell.run(question="x", backend=failing)
    assert caught.value.state.messages()[0]["content"] == "x"  # type: ignore[attr-defined]
    streaming = tell.run(question="x", backend=ScriptedBackend([OSError("no")]), stream=True)
    assert isinstance(streaming.error(), OSError)


def test_the_body_may_fail_while_it_holds_the_state(backend: ScriptedBackend) -> None:
    @sgl.function
    def fails(s: Any) -> Any:
        s += sgl.user("a")
        s += sgl.assistant(sgl.gen("x"))
        raise LookupError(s["x"])

    with pytest.raises(LookupError, match="echo a"):
        fails.run(backend=backend)


def test_several_threads_may_call_at_once(backend: ScriptedBackend) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = tell.run(question=str(number), backend=backend)["answer"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"echo {number}" for number in range(16)}


def test_it_works_where_a_loop_runs_already(backend: ScriptedBackend) -> None:
    async def cell() -> str:
        answer: str = tell.run(question="x", backend=backend)["answer"]
        return answer

    assert asyncio.run(cell()) == "echo x"


def test_a_program_may_call_another_one(backend: ScriptedBackend) -> None:
    @sgl.function
    def outer(s: Any) -> Any:
        s += sgl.user(tell.run(question="inner", backend=backend)["answer"])
        s += sgl.assistant(sgl.gen("x"))

    assert outer.run(backend=backend)["x"] == "echo echo inner"


def test_a_blocking_call_in_a_coroutine_program_says_what_to_do(
    backend: ScriptedBackend,
) -> None:
    @sgl.function
    async def outer(s: Any) -> Any:
        tell.run(question="inner", backend=backend)

    with pytest.raises(sgl.ProgramError, match="wait for itself"):
        outer.run(backend=backend)


def test_the_state_is_of_no_use_after_the_run(backend: ScriptedBackend) -> None:
    kept = []

    @sgl.function
    def leaks(s: Any) -> Any:
        kept.append(s)

    leaks.run(backend=backend)
    with pytest.raises(sgl.ClosedError, match="has ended"):
        kept[0] += "more"


def test_the_context_of_the_caller_counts(backend: ScriptedBackend) -> None:
    with sgl.use_backend(backend):
        assert tell.run(question="x")["answer"] == "echo x"


def test_tracing_and_binding(backend: ScriptedBackend) -> None:
    bound = tell.bind(question="bound")
    assert bound.run(backend=backend)["answer"] == "echo bound"
    kinds = [type(node).__name__ for node in tell.trace()]
    assert kinds.count("Gen") == 2


def test_ctrl_c_cancels_the_run_and_leaves_no_thread_of_it() -> None:
    code = """
        import os, signal, threading
        import asyncsgl.sync as sgl
        from asyncsgl.testing import ScriptedBackend

        class Waiting(ScriptedBackend):
            async def generate(self, request):
                os.kill(os.getpid(), signal.SIGINT)
                return await super().generate(request)

        @sgl.function
        def ask(s):
            s += sgl.gen("x")
            s["x"]

        backend = Waiting("never", delay=600)
        try:
            ask.run(backend=backend)
        except KeyboardInterrupt:
            left = [t for t in threading.enumerate() if t.name == "asyncsgl-program"]
            for thread in left:
                thread.join(5)
            left = [thread for thread in left if thread.is_alive()]
            print(backend.statistics()["cancelled"], backend.running, left)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.stdout.strip() == "1 0 []", done.stderr


def test_a_fork_of_the_process_gets_a_portal_of_its_own(backend: ScriptedBackend) -> None:
    assert tell.run(question="parent", backend=backend)["answer"] == "echo parent"
    child = os.fork()
    if child == 0:
        answer = tell.run(question="child", backend=ScriptedBackend(echo))["answer"]
        os._exit(0 if answer == "echo child" else 1)
    deadline = time.monotonic() + 15
    while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        threading.Event().wait(0.01)
    assert os.waitstatus_to_exitcode(waited[1]) == 0


def test_global_config_sets_the_default_backend(backend: ScriptedBackend) -> None:
    sgl.global_config.default_backend = backend
    try:
        assert tell.run(question="x")["answer"] == "echo x"
    finally:
        sgl.global_config.default_backend = None
    with pytest.raises(sgl.InvalidArgument, match="no_such"):
        sgl.global_config.no_such = 1
