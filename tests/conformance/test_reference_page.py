"""The snippets of the reference page, S1 to S27, blocking and async.

Each runs as it stands there. In the blocking form only the import lines change; the async form
is the same program awaited. The addresses of servers become those of servers of ours, models and
images are folders and files of the names that the page gives them, and what a snippet takes for
granted (``backend``, ``my_function`` …) comes from a prelude. Providers are the strict fakes.

S25 runs on the local engine, and on a server that stands in for SGLang's.
"""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import re
import socket
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from anyio.from_thread import start_blocking_portal

import asyncsgl
import asyncsgl.sync
from asyncsgl.errors import MissingDependency
from asyncsgl.testing import ScriptedBackend
from asyncsgl.testing_server import FakeServer
from tests.fakes.anthropic import KEY as ANTHROPIC_KEY
from tests.fakes.anthropic import FakeAnthropic
from tests.fakes.gemini import TOKEN, FakeGemini
from tests.fakes.openai import KEY as OPENAI_KEY
from tests.fakes.openai import FakeOpenAI
from tests.fakes.service import PNG, Seen

from .snippets import PAGE

PRELUDE = """
import asyncsgl.sync as sgl

@sgl.function
def my_function(s):
    s += sgl.user("Say something.")
    s += sgl.assistant(sgl.gen("answer", max_tokens=8))
"""
RUN = "state = my_function.run()"
LOOK = 'state = image_qa.run(image_path="photo.jpg", question="What is this?")'
LLAMA = (
    "meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/Llama-2-70b-chat-hf",
    "lmms-lab/llama3-llava-next-8b",
)
_WAITS = re.compile(
    r"(?<!await )\b(\w+\.(?:run|run_batch|start_profile|stop_profile)\("
    r"|sgl\.(?:get_server_info|flush_cache)\()"
)


@dataclass(frozen=True)
class After:
    """What shows that a snippet worked.

    Args:
        code: runs after it, in the blocking form, where the snippet itself asks for nothing.
        answered: names that it leaves behind, each a state or several.
        variable: what the states have.
        printed: part of what it prints.
        provider: the fakes that must have been asked.
    """

    code: str = ""
    answered: tuple[str, ...] = ("state",)
    variable: str = "answer"
    printed: str = ""
    provider: tuple[str, ...] = ()


SNIPPETS = {
    "S1": After(),
    "S2": After(),
    "S3": After(),
    "S5": After(
        f"""
        {RUN}
        assert state.text().startswith("<|start_header_id|>user<|end_header_id|>")
        runtime.shutdown()
        """
    ),
    "S6": After(RUN),
    "S7": After(RUN),
    "S9": After(RUN),
    "S10": After(f"chat = my_function.run(backend=sgl.OpenAI('gpt-4'))\n{RUN}",
                 ("chat", "state"), provider=("openai",)),
    "S11": After(RUN, provider=("openai",)),
    "S12": After("", ("state1", "state2"), provider=("openai",)),
    "S13": After(provider=("openai",)),
    "S14": After(RUN, provider=("openai",)),
    "S15": After(RUN, provider=("openai",)),
    "S16": After(RUN, provider=("anthropic",)),
    "S17": After("", variable="answer_2", printed="user : List two local", provider=("anthropic",)),
    "S18": After(RUN, provider=("gemini",)),
    "S19": After(LOOK, provider=("gemini",)),
    "S21": After("assert info['model_path'] == runtime_model", (), printed="'model_path'"),
    "S22": After("assert sgl.flush_cache()", ()),
    "S23": After("runtime.shutdown()"),
    "S24": After("", printed="<RuntimeEndpoint", provider=("openai", "anthropic")),
    "S26": After("", ("states",), printed="Q: What is the capital of France?\nA:"),
}  # fmt: skip
LITELLM = {
    "S20": After(RUN, provider=("openai",)),
    "S27": After("", variable="response", provider=("openai",)),
}
KEYS = {
    "OPENAI_API_KEY": "sk-...",
    "ANTHROPIC_API_KEY": "sk-ant-...",
    "AZURE_OPENAI_API_KEY": "",
    "AZURE_OPENAI_ENDPOINT": "",
    "TOGETHER_API_KEY": "",
    "GOOGLE_API_KEY": "",
    "GEMINI_API_KEY": "",
}
FORMS = ("blocking", "async")


def test_every_snippet_runs_here() -> None:
    assert sorted([*SNIPPETS, *LITELLM, "S4", "S8", "S25"]) == sorted(PAGE)
    assert len(PAGE) == 27


# -- the forms -----------------------------------------------------------------------------------


def imported(code: str, package: str) -> str:
    """The code with its import lines changed."""
    code = re.sub(r"^import sglang as sgl$", f"import {package} as sgl", code, flags=re.MULTILINE)
    return re.sub(r"^from sglang\.", "from asyncsgl.", code, flags=re.MULTILINE)


def awaited(code: str) -> str:
    """The same program in async form: what blocks is awaited."""
    return (
        _WAITS.sub(r"await \1", code)
        .replace(".shutdown()", ".aclose()")
        .replace("runtime.aclose", "await runtime.aclose")
    )


def run(form: str, code: str, names: dict[str, Any], package: str = "") -> str:
    """Run a snippet; what it prints. The names that it makes are added to ``names``."""
    printed = StringIO()
    for page, ours in names["ADDRESSES"].items():
        code = code.replace(page, ours)
    if form == "blocking":
        exec(PRELUDE, names)
        with redirect_stdout(printed):
            exec(imported(code, package or "asyncsgl.sync"), names)
        return printed.getvalue()
    body = textwrap.indent(awaited(imported(code, package or "asyncsgl")), "    ")
    prelude = PRELUDE.replace("asyncsgl.sync", "asyncsgl")
    exec(f"{prelude}\nasync def main():\n{body}\n    return locals()", names)
    with redirect_stdout(printed):
        names |= asyncio.run(names["main"]())
    return printed.getvalue()


def whole(name: str, after: After) -> str:
    return PAGE[name] + "\n" + textwrap.dedent(after.code)


def check(after: After, names: dict[str, Any], printed: str) -> None:
    for name in after.answered:
        made = names[name]
        for state in made if isinstance(made, list) else [made]:
            assert isinstance(state, asyncsgl.State)
            assert isinstance(state[after.variable], str)
            assert state.usage.requests >= 1
    assert after.printed in printed
    for provider in after.provider:
        assert names["FAKES"][provider].seen, f"nobody asked {provider}"


# -- the world of the page -----------------------------------------------------------------------


class OpenAIOfThePage(FakeOpenAI):
    """Takes the page's keys; LiteLLM's calls for Together go there, too."""

    def _authorize(self, request: web.Request, seen: Seen) -> None:
        for header in ("api-key", "authorization"):
            given = seen.headers.get(header, "")
            if given.removeprefix("Bearer ") in ("sk-...", "your-key"):
                seen.headers[header] = f"Bearer {OPENAI_KEY}".removeprefix(
                    "Bearer " if header == "api-key" else ""
                )
        super()._authorize(request, seen)


class AnthropicOfThePage(FakeAnthropic):
    """Takes the page's key."""

    def _check(self, seen: Seen) -> None:
        if seen.headers.get("authorization") == "Bearer sk-ant-...":
            seen.headers["authorization"] = f"Bearer {ANTHROPIC_KEY}"
        super()._check(seen)


class GeminiWithTokens(FakeGemini):
    """Gives service accounts their tokens, as Google's OAuth service does."""

    def routes(self) -> list[web.RouteDef]:
        return [*super().routes(), web.post("/token", self._token)]

    async def _token(self, request: web.Request) -> web.Response:
        form = await request.post()
        assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
        return web.json_response(
            {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's models and images lie: tiny random models, one small picture."""
    made = tmp_path_factory.mktemp("page")
    (made / "images").mkdir()
    for name in ("photo.jpg", "images/cat.jpeg"):
        (made / name).write_bytes(PNG)
    if find_spec("torch") is not None:
        from tests.engine.conftest import save_model

        for name in LLAMA[:-1]:
            save_model("llama", made / name)
        if find_spec("PIL") is not None:
            from tests.engine.tiny_vision import save_vision_model

            save_vision_model("llava_next", made / LLAMA[-1])
    return made


@pytest.fixture(scope="module")
def private_key() -> str:
    """A service account's key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Callable[[str], str]]:
    """Servers of ours, each started when it is first asked for: open, or with the page's key."""
    urls: dict[str, str] = {}
    with ExitStack() as running:

        def url(key: str) -> str:
            if key not in urls:
                settings = {"api_key": key} if key else None
                path = str(folder / LLAMA[0])
                runtime = asyncsgl.sync.Runtime(path, port=0, server_settings=settings)
                running.callback(runtime.shutdown)
                assert runtime.url is not None
                urls[key] = runtime.url
            return urls[key]

        yield url


@pytest.fixture
def fakes() -> Iterator[dict[str, Any]]:
    """The providers, on an event loop of their own."""
    made = {
        "openai": OpenAIOfThePage(),
        "anthropic": AnthropicOfThePage(),
        "gemini": GeminiWithTokens(),
    }
    with start_blocking_portal() as portal, ExitStack() as open_ones:
        for fake in made.values():
            open_ones.enter_context(portal.wrap_async_context_manager(fake))
        yield made


@pytest.fixture
def names(
    folder: Path, fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """What the snippets take for granted, in an environment where the providers are fakes."""
    monkeypatch.chdir(folder)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)  # what snippets set themselves is undone with it
    monkeypatch.setenv("OPENAI_BASE_URL", f"{fakes['openai'].url}/v1")
    monkeypatch.setenv("TOGETHER_AI_API_BASE", f"{fakes['openai'].url}/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", fakes["anthropic"].url)
    monkeypatch.setenv("GOOGLE_VERTEX_BASE_URL", fakes["gemini"].url)
    yield {
        "ADDRESSES": {"https://your-resource.openai.azure.com/": fakes["openai"].url},
        "FAKES": fakes,
        "backend": ScriptedBackend("one"),
        "alternative_backend": ScriptedBackend("two"),
    }
    asyncsgl.set_default_backend(None)


@pytest.fixture
def as_google_account(
    tmp_path: Path, fakes: dict[str, Any], private_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service account in the environment, and the project that S19 does not name."""
    account = {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "1",
        "private_key": private_key,
        "client_email": "tests@project.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"{fakes['gemini'].url}/token",
    }
    path = tmp_path / "account.json"
    path.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.setenv("GOOGLE_API_USE_CLIENT_CERTIFICATE", "false")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-central1")


@pytest.fixture
def unused_tcp_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


# -- the snippets --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(
    name: str,
    form: str,
    names: dict[str, Any],
    served: Callable[[str], str],
    unused_tcp_port: int,
    request: pytest.FixtureRequest,
) -> None:
    page = PAGE[name]
    if "VertexAI" in page:
        request.getfixturevalue("as_google_account")
    if "http://localhost:30000" in page:
        names["ADDRESSES"] |= {"http://localhost:30000": served("")}
    if name in ("S21", "S22"):
        names["runtime_model"] = str(Path(LLAMA[0]).resolve())
        names["backend"] = asyncsgl.RuntimeEndpoint(served(""))
        asyncsgl.set_default_backend(names["backend"])
    if name == "S7":
        names["ADDRESSES"] |= {"https://api.example.com": served("your-api-key")}
    names["ADDRESSES"] |= {"port=30000": f"port={unused_tcp_port}"}
    code = whole(name, SNIPPETS[name])
    if name == "S23":  # that the runtime is the default backend goes without saying there
        code = code.replace("runtime.st", "sgl.set_default_backend(runtime)\nruntime.st", 1)
    printed = run(form, code, names)
    check(SNIPPETS[name], names, printed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LITELLM)
def test_snippet_with_litellm(name: str, form: str, names: dict[str, Any]) -> None:
    """Where LiteLLM is not installed, the snippet says what to install."""
    if find_spec("litellm") is None:
        with pytest.raises(MissingDependency, match=r"asyncsgl\[litellm\]"):
            run(form, whole(name, LITELLM[name]), names)
        return
    printed = run(form, whole(name, LITELLM[name]), names)
    check(LITELLM[name], names, printed)


@pytest.mark.timeout(60)  # it starts three more processes
@pytest.mark.parametrize("form", FORMS)
def test_s4_a_model_over_four_processes(form: str, names: dict[str, Any]) -> None:
    after = After(
        f"""
        {RUN}
        size = runtime.engine.config.tp_size
        runtime.shutdown()
        """
    )
    printed = run(form, PAGE["S4"] + textwrap.dedent(after.code), names)
    check(after, names, printed)
    assert names["size"] == 4


@pytest.mark.timeout(60)
def test_s8_a_server_started_from_the_command_line(
    names: dict[str, Any], unused_tcp_port: int, folder: Path
) -> None:
    command = PAGE["S8"].replace("sglang", "asyncsgl").replace("30000", str(unused_tcp_port))
    words = command.replace("\\\n", " ").split()
    assert words[:3] == ["python", "-m", "asyncsgl.launch_server"]
    with subprocess.Popen(
        [sys.executable, *words[1:]], stderr=subprocess.PIPE, text=True, cwd=folder
    ) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            assert any(f":{unused_tcp_port}" in line for line in lines)
            names["ADDRESSES"] |= {"localhost:30000": f"localhost:{unused_tcp_port}"}
            check(SNIPPETS["S9"], names, run("blocking", whole("S9", SNIPPETS["S9"]), names))
        finally:
            server.terminate()
        assert server.wait(20) == 0


@pytest.fixture
def start_method() -> Iterator[None]:
    """S25 sets how processes start, for all of this process."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("start_method")
@pytest.mark.parametrize("form", FORMS)
def test_s25_on_the_local_engine(form: str, names: dict[str, Any], folder: Path) -> None:
    from tests.engine.tiny_vision import VisionOracle

    printed = run(form, PAGE["S25"], names)
    check(After(), names, "")
    assert printed == f"{names['state']['answer']}\n"
    oracle = VisionOracle(folder / LLAMA[-1])
    text = "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert names["state"].meta("answer").prompt_tokens == len(oracle.ids(text, [PNG]))

    greedy = PAGE["S25"].replace("tokens=128", "tokens=16, temperature=0")
    run(form, greedy.replace('8b")', '8b", dtype="float32")'), names)
    tokens = oracle(text, [PNG], 16)
    end = tokens.index(257) if 257 in tokens else len(tokens)
    expected = oracle.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    assert names["state"]["answer"] == expected


@pytest.mark.usefixtures("start_method")
@pytest.mark.parametrize("form", FORMS)
def test_s25_on_a_server_with_eyes(
    form: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of ``sgl.Runtime`` stands a scripted server of SGLang's protocol."""

    class Runtime(asyncsgl.RuntimeEndpoint):
        def __init__(self, model_path: str) -> None:
            assert model_path == LLAMA[2]
            super().__init__(server.url)
            self.endpoint = self

        def shutdown(self) -> None:
            """The server is the test's."""

    class WithEyes(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(asyncsgl.sync if form == "blocking" else asyncsgl, name)

    module = WithEyes("with_eyes")
    module.Runtime = Runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "with_eyes", module)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(FakeServer("A cat.")) as server,
    ):
        printed = run(form, PAGE["S25"], names, "with_eyes")
        [body] = server.generates()
    assert printed == "A cat.\n"
    assert names["state"].usage.requests == 1
    assert body["sampling_params"]["max_new_tokens"] == 128
    assert body["text"].startswith("<|start_header_id|>user<|end_header_id|>\n\n<image>")
    [image] = body["image_data"]
    assert base64.b64decode(image.rpartition(",")[2]) == PNG
