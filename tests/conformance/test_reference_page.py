"""The snippets of the reference page, S1 to S27, blocking and async.

A snippet runs as it stands there with only its import lines, model names, paths and the
addresses of servers changed; what it takes for granted (``backend``, ``my_function`` …) comes
from a prelude. The async form is the same program awaited.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import asyncsgl
import asyncsgl.sync
from asyncsgl.testing import ScriptedBackend
from tests.engine.conftest import save_model

PAGE = tuple(f"S{number}" for number in range(1, 28))

PRELUDE = """
import asyncsgl.sync as sgl

@sgl.function
def my_function(s):
    s += sgl.user("Say something.")
    s += sgl.assistant(sgl.gen("answer", max_tokens=8))
"""
ASYNC_PRELUDE = PRELUDE.replace("asyncsgl.sync as sgl", "asyncsgl as sgl")


@dataclass(frozen=True)
class Snippet:
    """One snippet of the page.

    Args:
        blocking: as the page has it.
        awaited: the same in async form; the body of a coroutine.
        answered: what must be among the names that it leaves behind.
    """

    blocking: str
    awaited: str
    answered: tuple[str, ...] = ()


SNIPPETS = {
    "S1": Snippet(
        """
        import asyncsgl.sync as sgl

        # Set the backend
        sgl.set_default_backend(backend)

        # Now you can run functions
        state = my_function.run()
        """,
        """
        sgl.set_default_backend(backend)
        state = await my_function.run()
        """,
        ("state",),
    ),
    "S2": Snippet(
        """
        state = my_function.run(backend=alternative_backend)
        """,
        """
        state = await my_function.run(backend=alternative_backend)
        """,
        ("state",),
    ),
    "S3": Snippet(
        """
        import asyncsgl.sync as sgl

        # Launch local runtime
        runtime = sgl.Runtime(
            model_path=MODEL,
            port=PORT,
        )
        sgl.set_default_backend(runtime)

        # Use the runtime
        state = my_function.run()

        # Shutdown when done
        runtime.shutdown()
        """,
        """
        runtime = sgl.Runtime(
            model_path=MODEL,
            port=PORT,
        )
        sgl.set_default_backend(runtime)
        state = await my_function.run()
        await runtime.aclose()
        """,
        ("state",),
    ),
    "S5": Snippet(
        """
        from asyncsgl.lang.chat_template import get_chat_template

        runtime = sgl.Runtime(
            model_path=MODEL,
        )
        runtime.endpoint.chat_template = get_chat_template("llama-3-instruct-llava")
        sgl.set_default_backend(runtime)

        state = my_function.run()
        assert state.text().startswith("<|start_header_id|>user<|end_header_id|>")
        runtime.shutdown()
        """,
        """
        from asyncsgl.lang.chat_template import get_chat_template

        runtime = sgl.Runtime(
            model_path=MODEL,
        )
        runtime.endpoint.chat_template = get_chat_template("llama-3-instruct-llava")
        sgl.set_default_backend(runtime)

        state = await my_function.run()
        assert state.text().startswith("<|start_header_id|>user<|end_header_id|>")
        await runtime.aclose()
        """,
        ("state",),
    ),
    "S26": Snippet(
        """
        import asyncsgl.sync as sgl

        @sgl.function
        def text_qa(s, question):
            s += "Q: " + question + "\\n"
            s += "A:" + sgl.gen("answer", stop="\\n")

        runtime = sgl.Runtime(
            model_path=MODEL,
            tp_size=1,
        )
        sgl.set_default_backend(runtime)

        # Process batch
        states = text_qa.run_batch(
            [
                {"question": "What is the capital of the United Kingdom?"},
                {"question": "What is the capital of France?"},
                {"question": "What is the capital of Japan?"},
            ],
            progress_bar=True,
            num_threads="auto",
        )

        for s in states:
            print(s.text())

        runtime.shutdown()
        """,
        """
        @sgl.function
        def text_qa(s, question):
            s += "Q: " + question + "\\n"
            s += "A:" + sgl.gen("answer", stop="\\n")

        async with sgl.Runtime(
            model_path=MODEL,
            tp_size=1,
        ) as runtime:
            sgl.set_default_backend(runtime)
            states = await text_qa.run_batch(
                [
                    {"question": "What is the capital of the United Kingdom?"},
                    {"question": "What is the capital of France?"},
                    {"question": "What is the capital of Japan?"},
                ],
                progress_bar=True,
                num_threads="auto",
            )
        for s in states:
            print(s.text())
        """,
        ("states",),
    ),
}

SERVED = {
    "S6": Snippet(
        """
        import asyncsgl.sync as sgl

        # Connect to existing server
        backend = sgl.RuntimeEndpoint(URL)
        sgl.set_default_backend(backend)

        state = my_function.run()
        """,
        """
        backend = sgl.RuntimeEndpoint(URL)
        sgl.set_default_backend(backend)

        state = await my_function.run()
        await backend.aclose()
        """,
        ("state",),
    ),
    "S7": Snippet(
        """
        backend = sgl.RuntimeEndpoint(
            URL,
            api_key="your-api-key"
        )
        sgl.set_default_backend(backend)

        state = my_function.run()
        """,
        """
        backend = sgl.RuntimeEndpoint(
            URL,
            api_key="your-api-key"
        )
        sgl.set_default_backend(backend)

        state = await my_function.run()
        await backend.aclose()
        """,
        ("state",),
    ),
    "S9": Snippet(
        """
        sgl.set_default_backend(sgl.RuntimeEndpoint(URL))

        state = my_function.run()
        """,
        """
        sgl.set_default_backend(sgl.RuntimeEndpoint(URL))

        state = await my_function.run()
        await sgl.get_default_backend().aclose()
        """,
        ("state",),
    ),
    "S21": Snippet(
        """
        backend = sgl.RuntimeEndpoint(URL)

        # For Runtime or RuntimeEndpoint
        info = sgl.get_server_info(backend)
        print(info)
        assert info["model_path"] == MODEL
        """,
        """
        async with sgl.RuntimeEndpoint(URL) as backend:
            info = await sgl.get_server_info(backend)
        print(info)
        assert info["model_path"] == MODEL
        """,
    ),
    "S22": Snippet(
        """
        backend = sgl.RuntimeEndpoint(URL)
        sgl.set_default_backend(backend)

        sgl.flush_cache(backend)
        # Or use default backend
        sgl.flush_cache()
        """,
        """
        async with sgl.RuntimeEndpoint(URL) as backend:
            sgl.set_default_backend(backend)
            await sgl.flush_cache(backend)
            await sgl.flush_cache()
        """,
    ),
    "S23": Snippet(
        """
        runtime = sgl.Runtime(model_path=MODEL)
        sgl.set_default_backend(runtime)
        runtime.start_profile()

        # Run your functions
        state = my_function.run()

        runtime.stop_profile()
        runtime.shutdown()
        """,
        """
        async with sgl.Runtime(model_path=MODEL) as runtime:
            sgl.set_default_backend(runtime)
            await runtime.start_profile()
            state = await my_function.run()
            await runtime.stop_profile()
        """,
        ("state",),
    ),
}
LAUNCH = "python -m asyncsgl.launch_server --model-path MODEL --port PORT"

NOT_YET = {
    "S4": "tensor parallelism over 4 GPUs",
    **{f"S{number}": "a provider's backend" for number in (*range(10, 21), 24, 27)},
    "S25": "images in the local engine",
}


def test_every_snippet_is_covered_or_listed_as_not_yet() -> None:
    assert sorted([*SNIPPETS, *SERVED, "S8", *NOT_YET]) == sorted(PAGE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model."""
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def names(model: Path, unused_tcp_port: int) -> Iterator[dict[str, Any]]:
    """What the snippets take for granted."""
    yield {
        "MODEL": str(model),
        "PORT": unused_tcp_port,
        "backend": ScriptedBackend("one"),
        "alternative_backend": ScriptedBackend("two"),
    }
    asyncsgl.set_default_backend(None)


@pytest.fixture
def unused_tcp_port() -> int:
    """A port that is free now."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def check(snippet: Snippet, names: dict[str, Any]) -> None:
    for name in snippet.answered:
        made = names[name]
        for state in made if isinstance(made, list) else [made]:
            assert isinstance(state, asyncsgl.State)
            assert isinstance(state["answer"], str)
            assert state.usage.requests == 1


@pytest.mark.parametrize("name", SNIPPETS)
def test_blocking(name: str, names: dict[str, Any]) -> None:
    exec(PRELUDE, names)
    with redirect_stdout(StringIO()):
        exec(textwrap.dedent(SNIPPETS[name].blocking), names)
    check(SNIPPETS[name], names)


@pytest.mark.parametrize("name", SNIPPETS)
def test_async(name: str, names: dict[str, Any]) -> None:
    body = textwrap.indent(textwrap.dedent(SNIPPETS[name].awaited), "    ")
    exec(f"{ASYNC_PRELUDE}\nasync def main():\n{body}\n    return locals()", names)
    with redirect_stdout(StringIO()):
        made = asyncio.run(names["main"]())
    check(SNIPPETS[name], made)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """A server of ours, which wants the key that S7 sends, or none."""
    runtime = asyncsgl.sync.Runtime(str(model), port=0)
    assert runtime.url is not None
    yield runtime.url
    runtime.shutdown()


@pytest.mark.parametrize("name", SERVED)
def test_blocking_with_a_server(name: str, names: dict[str, Any], url: str) -> None:
    names["URL"] = url
    exec(PRELUDE, names)
    with redirect_stdout(StringIO()):
        exec(textwrap.dedent(SERVED[name].blocking), names)
    check(SERVED[name], names)


@pytest.mark.parametrize("name", SERVED)
def test_async_with_a_server(name: str, names: dict[str, Any], url: str) -> None:
    names["URL"] = url
    body = textwrap.indent(textwrap.dedent(SERVED[name].awaited), "    ")
    exec(f"{ASYNC_PRELUDE}\nasync def main():\n{body}\n    return locals()", names)
    with redirect_stdout(StringIO()):
        made = asyncio.run(names["main"]())
    check(SERVED[name], made)


@pytest.mark.timeout(60)
def test_s8_a_server_started_from_the_command_line(names: dict[str, Any]) -> None:
    words = LAUNCH.replace("MODEL", names["MODEL"]).replace("PORT", str(names["PORT"])).split()
    with subprocess.Popen(
        [sys.executable, *words[1:]], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            assert any(f":{names['PORT']}" in line for line in lines)
            names["URL"] = f"http://localhost:{names['PORT']}"
            exec(PRELUDE, names)
            exec(textwrap.dedent(SERVED["S9"].blocking), names)
            check(SERVED["S9"], names)
        finally:
            server.terminate()
        assert server.wait(20) == 0
