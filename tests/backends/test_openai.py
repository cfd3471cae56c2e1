"""What is particular to OpenAI: families, learning from refusals, decisions, Azure, settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pytest

import asyncsgl as sgl
from asyncsgl.backends.budget import known_price
from asyncsgl.backends.openai import OpenAI
from asyncsgl.backends.openai_models import is_completion_model, is_reasoning_model
from asyncsgl.backends.retry import RetryPolicy
from asyncsgl.errors import (
    BackendError,
    BudgetExceeded,
    ContentFilterError,
    ContextLengthError,
    InvalidArgument,
    OutputError,
    UnsupportedFeature,
)
from tests.fakes.openai import KEY, FakeOpenAI
from tests.fakes.service import Fault

pytestmark = pytest.mark.anyio
NOTHING: Mapping[str, Any] = {}


@pytest.fixture
async def fake() -> AsyncGenerator[FakeOpenAI, None]:
    async with FakeOpenAI() as service:
        yield service


def at(fake: FakeOpenAI, model: str = "gpt-4o", **settings: Any) -> OpenAI:
    return OpenAI(model, base_url=f"{fake.url}/v1", api_key=KEY, **settings)


@sgl.function
async def ask(s: sgl.ProgramState, gen: Mapping[str, Any] = NOTHING) -> None:
    s += sgl.system("You are brief.")
    s += sgl.user("Who?")
    s += sgl.assistant(sgl.gen("answer", **gen))


@pytest.mark.parametrize(
    ("model", "reasoning", "completion"),
    [
        ("o1-mini", True, False),
        ("o3", True, False),
        ("gpt-5.5", True, False),
        ("gpt-6-luna", True, False),
        ("gpt-10", True, False),
        ("gpt-5-chat-latest", False, False),
        ("gpt-4", False, False),
        ("gpt-4o", False, False),
        ("gpt-4-vision-preview", False, False),
        ("gpt-3.5-turbo", False, False),
        ("gpt-3.5-turbo-instruct", False, True),
        ("davinci-002", False, True),
        ("ft:babbage-002:x", False, True),
        ("my-model", False, False),
    ],
)
def test_families_by_name(model: str, reasoning: bool, completion: bool) -> None:
    assert is_reasoning_model(model) is reasoning
    assert is_completion_model(model) is completion


async def test_reasoning_models_get_no_limit_unless_asked_for(fake: FakeOpenAI) -> None:
    async with at(fake, "gpt-5.5") as backend:
        state = await ask.run(backend=backend)
        await ask.run(gen={"max_tokens": 50}, backend=backend)
    assert "max_completion_tokens" not in fake.bodies[0]
    assert fake.bodies[1]["max_completion_tokens"] == 50
    assert "max_tokens" not in fake.bodies[1]
    assert state.usage.reasoning_tokens == 7
    assert state.usage.cached_tokens == 3


async def test_effort_none_frees_the_sampling(fake: FakeOpenAI) -> None:
    async with at(fake, "gpt-5.5", reasoning_effort="none") as backend:
        await ask.run(gen={"temperature": 0.3}, backend=backend)
    assert fake.bodies[0]["temperature"] == 0.3
    assert fake.bodies[0]["reasoning_effort"] == "none"


async def test_another_name_of_the_limit_is_learned_once(fake: FakeOpenAI) -> None:
    fake.refuses = {"max_tokens"}
    async with at(fake, "my-deployment") as backend:
        for _ in range(2):
            state = await ask.run(gen={"max_tokens": 50}, backend=backend)
            assert state["answer"] == "Hello world"
        await ask.run(backend=backend)
    sent = [sorted({"max_tokens", "max_completion_tokens"} & set(body)) for body in fake.bodies]
    assert sent == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"], []]


async def test_calls_that_are_refused_together_learn_together(fake: FakeOpenAI) -> None:
    fake.refuses = {"max_tokens", "seed"}
    async with at(fake, "my-deployment", drop_params=True) as backend:
        asked = [ask.run(gen={"max_tokens": 9, "seed": 1}, backend=backend) for _ in range(20)]
        states = await asyncio.gather(*asked)
    assert {state["answer"] for state in states} == {"Hello world"}


async def test_a_refused_stop_is_cut_here(fake: FakeOpenAI) -> None:
    fake.refuses = {"stop"}
    fake.answers = "one two three"
    async with at(fake, "my-deployment") as backend:
        state = await ask.run(gen={"stop": " two"}, backend=backend)
        assert state["answer"] == "one"
        async with ask.stream(gen={"stop": " two"}, backend=backend) as running:
            assert "".join([piece async for piece in running.text("answer")]) == "one"
    assert ["stop" in body for body in fake.bodies] == [True, False, False]


async def test_a_refused_field_is_an_error_and_is_not_sent_again(fake: FakeOpenAI) -> None:
    fake.refuses = {"temperature"}
    async with at(fake, "my-deployment") as backend:
        for _ in range(2):
            with pytest.raises(UnsupportedFeature, match="temperature"):
                await ask.run(gen={"temperature": 0.3}, backend=backend)
        assert backend.capabilities.support("temperature") == "refused"
    assert len(fake.seen) == 1
    async with at(fake, "my-deployment", drop_params=True) as backend:
        state = await ask.run(gen={"temperature": 0.3}, backend=backend)
    meta = state.meta("answer")
    assert isinstance(meta, sgl.Meta)
    assert meta.emulated == ("temperature: dropped",)


async def test_without_schemas_the_answer_is_checked(fake: FakeOpenAI) -> None:
    fake.refuses = {"response_format"}
    fake.answers = ["not json", '```json\n{"a": 1}\n```']
    async with at(fake, "my-deployment") as backend:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        state = await ask.run(gen={"json_schema": schema}, backend=backend)
    assert state.value("answer") == {"a": 1}
    assert len(fake.seen) == 3


async def test_whole_numbers_come_by_a_schema(fake: FakeOpenAI) -> None:
    fake.answers = "42"
    async with at(fake) as backend:
        state = await ask.run(gen={"dtype": int}, backend=backend)
    assert state.value("answer") == 42
    schema = fake.bodies[0]["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["properties"] == {"value": {"type": "integer"}}


has_decisions = pytest.mark.skipif(
    version("openai").startswith("2."), reason="the older SDK has no Decisions API"
)


@has_decisions
async def test_decisions_have_scores(fake: FakeOpenAI) -> None:
    @sgl.function
    async def choose(s: sgl.ProgramState) -> None:
        s += sgl.user("Is it?")
        s += sgl.assistant("I think: " + sgl.select("verdict", ["yes", "no"]))

    fake.answers = "no"
    async with at(fake, "gpt-6-luna") as backend:
        state = await choose.run(backend=backend)
    assert state["verdict"] == "no"
    meta = state.meta("verdict")
    assert isinstance(meta, sgl.Meta)
    assert meta.emulated == ()
    assert meta.choice_logprobs is not None
    assert meta.choice_logprobs[1][0] == pytest.approx(-0.105, abs=0.01)
    assert fake.seen[0].path == "/v1/decisions"
    assert "I think: " in fake.bodies[0]["questions"][0]["instructions"]


@sgl.function
async def choose(s: sgl.ProgramState, choices: list[str]) -> None:
    s += sgl.user("Is it?")
    s += sgl.assistant(sgl.select("verdict", choices))


@has_decisions
async def test_without_the_decisions_api_the_model_chooses_by_a_schema(fake: FakeOpenAI) -> None:
    fake.decides = False
    fake.answers = "no"
    async with at(fake, "gpt-6-luna") as backend:
        for _ in range(2):
            state = await choose.run(choices=["yes", "no"], backend=backend)
            assert state["verdict"] == "no"
            assert state.meta("verdict").emulated == ("select: by a JSON schema of the choices",)
        assert backend.capabilities.support("select") == "emulated"
    paths = [seen.path.removeprefix("/v1/") for seen in fake.seen]
    assert paths == ["decisions", "chat/completions", "chat/completions"]


class Letters:
    """A tokenizer whose tokens are pairs of letters where it has them, else single letters."""

    def __init__(self, *pairs: str) -> None:
        self.vocabulary = [*pairs, *(chr(code) for code in range(9, 127)), ""]
        self.eot_token = len(self.vocabulary) - 1

    def encode(self, text: str, /) -> list[int]:
        tokens: list[int] = []
        while text:
            size = 2 if text[:2] in self.vocabulary else 1
            tokens.append(self.vocabulary.index(text[:size]))
            text = text[size:]
        return tokens

    def decode(self, tokens: Sequence[int], /) -> str:
        return "".join(self.vocabulary[token] for token in tokens)


@pytest.mark.parametrize(
    ("choices", "said", "calls"),
    [
        (["yes", "no"], "no", 1),
        (["north", "nothing", "never"], "nothing", 2),
        (["no", "none", "not"], "no", 1),
        (["no", "none", "not"], "none", 1),
        ([" a", " b"], " b", 1),
        (["one"], "one", 0),
    ],
)
async def test_completion_models_that_do_not_echo_are_led_token_by_token(
    fake: FakeOpenAI, choices: list[str], said: str, calls: int
) -> None:
    letters = Letters(": ", "th", "ne")
    fake.vocabulary, fake.answers, fake.echoes = letters.vocabulary, said, False
    async with at(fake, "davinci-002", tokenizer=letters) as backend:
        state = await choose.run(choices=choices, backend=backend)
        assert state["verdict"] == said
        assert state.meta("verdict").emulated == ("select: token by token, with logit_bias",)
        assert state.usage.requests == calls
        assert backend.capabilities.support("select") == "emulated"
        await choose.run(choices=choices, backend=backend)
    assert ["echo" in body for body in fake.bodies] == [True] + [False] * (2 * calls)


async def test_scoring_sets_nothing_aside_for_an_answer(fake: FakeOpenAI) -> None:
    fake.logprob_of = {"no": -0.1, "ASSISTANT:no": -0.1}
    async with at(fake, "davinci-002", max_tokens_total=300) as backend:
        state = await choose.run(choices=["yes", "no"], backend=backend)
        assert state["verdict"] == "no"
        assert state.usage.completion_tokens == 0


async def test_a_token_that_is_none_of_the_choices_is_an_error(fake: FakeOpenAI) -> None:
    letters = Letters()
    fake.vocabulary, fake.echoes = [*letters.vocabulary[:-1], "!"], False
    fake.vocabulary[letters.encode("y")[0]] = fake.vocabulary[letters.encode("n")[0]] = "?"
    async with at(fake, "davinci-002", tokenizer=letters) as backend:
        with pytest.raises(OutputError, match=r"'\?'.*'n', 'y'"):
            await choose.run(choices=["yes", "no"], backend=backend)


async def test_without_a_tokenizer_the_model_is_asked_for_one_of_the_choices(
    fake: FakeOpenAI,
) -> None:
    fake.answers, fake.echoes = ["perhaps", "no"], False
    async with at(fake, "my-model", is_chat_model=False) as backend:
        state = await choose.run(choices=["yes", "no"], backend=backend)
    assert state["verdict"] == "no"
    assert state.meta("verdict").emulated == ("select: by asking for one of the choices",)
    assert state.usage.requests == 2


async def test_the_system_message_is_the_developers_on_hosted_reasoning_models() -> None:
    backend = OpenAI("gpt-5.5", api_key=KEY)
    plan = backend._plan(  # what would be sent
        sgl.GenRequest(
            (sgl_message("system", "Be brief."), sgl_message("user", "Who?")),
            sgl.SamplingParams(),
            "gen-1",
        )
    )
    assert backend._body(plan.call)["extra_body"]["messages"][0]["role"] == "developer"


def sgl_message(role: Any, text: str) -> Any:
    from asyncsgl.types import Message

    return Message(role, (text,))


async def test_azure_in_both_forms(fake: FakeOpenAI) -> None:
    settings: dict[str, Any] = {"is_azure": True, "azure_endpoint": fake.url, "api_key": KEY}
    async with OpenAI("gpt-35-turbo", api_version="2024-02-15-preview", **settings) as old:
        await ask.run(backend=old)
    async with OpenAI("gpt-35-turbo", **settings) as new:
        await ask.run(backend=new)
    paths = [seen.path for seen in fake.seen]
    assert paths == [
        "/openai/deployments/gpt-35-turbo/chat/completions",
        "/openai/v1/chat/completions",
    ]
    assert "api-key" in fake.seen[0].headers


async def coroutine_token() -> str:
    return KEY


def plain_token() -> str:
    time.sleep(0.001)  # it may block: it runs in a thread
    return KEY


@pytest.mark.parametrize("version", [None, "2024-10-21"])
@pytest.mark.parametrize("provider", [coroutine_token, plain_token])
async def test_azure_with_a_token_provider(
    fake: FakeOpenAI, provider: Callable[[], Any], version: str | None
) -> None:
    async with OpenAI(
        "gpt-35-turbo",
        is_azure=True,
        azure_endpoint=fake.url,
        api_version=version,
        azure_ad_token_provider=provider,
    ) as backend:
        assert (await ask.run(backend=backend))["answer"] == "Hello world"
    assert fake.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert "api-key" not in fake.seen[0].headers


@pytest.mark.parametrize("version", [None, "2024-10-21"])
async def test_azure_with_a_token(fake: FakeOpenAI, version: str | None) -> None:
    settings: dict[str, Any] = {"is_azure": True, "azure_endpoint": fake.url}
    async with OpenAI(
        "gpt-35-turbo", api_version=version, azure_ad_token=KEY, **settings
    ) as backend:
        assert (await ask.run(backend=backend))["answer"] == "Hello world"


async def test_a_key_that_a_function_gives(fake: FakeOpenAI) -> None:
    async with OpenAI("gpt-4o", base_url=f"{fake.url}/v1", api_key=plain_token) as backend:
        assert (await ask.run(backend=backend))["answer"] == "Hello world"


async def test_errors_that_only_openai_has(fake: FakeOpenAI) -> None:
    async with at(fake, max_retries=5) as backend:
        fake.context = 1
        with pytest.raises(ContextLengthError):
            await ask.run(backend=backend)
        fake.context = 1000
        fake.faults.append(Fault("status", 400, code="content_filter"))
        with pytest.raises(ContentFilterError):
            await ask.run(backend=backend)
        fake.faults.append(Fault("status", 429, code="insufficient_quota"))
        with pytest.raises(BackendError) as caught:
            await ask.run(backend=backend)
        assert type(caught.value) is BackendError
        assert len(fake.seen) == 3, "none of them is tried again"


@pytest.mark.parametrize("status", [408, 409, 425, 502, 504])
async def test_what_comes_at_a_bad_time_is_tried_again(fake: FakeOpenAI, status: int) -> None:
    fake.faults.append(Fault("status", status))
    async with at(fake) as backend:
        backend.policy = RetryPolicy(first_delay=0.001)
        assert (await ask.run(backend=backend))["answer"] == "Hello world"
    assert len(fake.seen) == 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_refusals_are_errors(fake: FakeOpenAI, streamed: bool) -> None:
    fake.refusal_text = "I cannot help with that."
    async with at(fake) as backend:
        with pytest.raises(ContentFilterError, match="I cannot help"):
            await (read(backend) if streamed else ask.run(backend=backend))
        fake.refusal_text, fake.filtered = "", True
        with pytest.raises(ContentFilterError):
            await (read(backend) if streamed else ask.run(backend=backend))


async def read(backend: OpenAI) -> None:
    async with ask.stream(backend=backend) as running:
        async for _ in running:
            pass
        await running.result()


async def test_reasoning_in_the_open(fake: FakeOpenAI) -> None:
    @sgl.function
    async def think(s: sgl.ProgramState) -> None:
        s += sgl.user("Think.")
        s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer"), "qwen3"))

    fake.reasoning = "Because."
    async with at(fake) as backend:
        state = await think.run(backend=backend)
        assert (state["answer"], state["answer_reasoning_content"]) == ("Hello world", "Because.")


async def test_a_budget_stops_the_run_before_it_is_passed(fake: FakeOpenAI) -> None:
    async with at(fake, max_tokens_total=300) as backend:
        await ask.run(backend=backend)
        await ask.run(gen={"max_tokens": 100}, backend=backend)
        with pytest.raises(BudgetExceeded):
            await ask.run(gen={"max_tokens": 400}, backend=backend)
    assert len(fake.seen) == 2
    async with at(fake, price=(1.0, 2.0), max_cost=0.001) as backend:
        await ask.run(backend=backend)
        assert backend.cost is not None
        assert 0 < backend.cost < 0.001
        with pytest.raises(BudgetExceeded, match="max_cost"):
            await ask.run(gen={"max_tokens": 500}, backend=backend)


async def test_what_was_cut_or_left_is_paid_for(fake: FakeOpenAI) -> None:
    fake.answers = "one two three four five six"
    async with at(fake, "gpt-5.5", price=(1.0, 2.0)) as backend:
        await ask.run(gen={"stop": " four"}, backend=backend)  # the stream is cut here
        cut = backend.statistics()
        assert cut["requests"] == 1
        assert cut["prompt_tokens"] > 0
        assert cut["completion_tokens"] > 0
        assert cut["cost"] > 0
        fake.faults.append(Fault("no_answer"))
        fake.came.clear()
        task = asyncio.create_task(ask.run(backend=backend))
        await fake.came.wait()
        task.cancel()
        await asyncio.wait([task])
        left = backend.statistics()
        assert left["requests"] == 2
        assert left["completion_tokens"] == cut["completion_tokens"]
        assert left["prompt_tokens"] == 2 * cut["prompt_tokens"]
        backend.policy = RetryPolicy(max_retries=0)
        fake.faults.append(Fault("status", 500))
        with pytest.raises(BackendError):
            await ask.run(backend=backend)
        assert backend.statistics()["requests"] == 2, "a refusal costs nothing"


async def test_only_a_price_that_is_known_is_said(fake: FakeOpenAI) -> None:
    pytest.importorskip("genai_prices")
    async with at(fake, "gpt-4o") as backend:
        await ask.run(backend=backend)
        assert backend.cost is None, "another server has OpenAI's model names, not its prices"
        assert "cost" not in backend.statistics()
    assert known_price("openai", "gpt-4o") is not None
    assert known_price("https://api.openai.com/v1", "gpt-4o") is not None
    assert known_price("openai", "my-model") is None
    assert known_price("", "gpt-4o") is None


async def test_there_are_connections_for_as_many_calls_as_the_service_bears(
    fake: FakeOpenAI,
) -> None:
    fake.faults.extend([Fault("slow", seconds=0.2)] * 160)
    async with at(fake, concurrency="auto") as backend:
        begun = backend.limiter.concurrency
        await asyncio.gather(*[ask.run(backend=backend) for _ in range(160)])
        assert begun + 5 < backend.limiter.concurrency
    assert fake.most_running > begun + 5


async def test_what_is_not_known_is_not_sent_as_a_client_setting(fake: FakeOpenAI) -> None:
    async with at(fake, no_such_setting=1) as backend:
        with pytest.raises(InvalidArgument, match="no_such_setting"):
            await ask.run(backend=backend)


@sgl.function
async def look(s: sgl.ProgramState) -> None:
    s += sgl.user("What? " + sgl.image("https://example.org/a.png?x=1"))
    s += sgl.assistant(sgl.gen("answer"))


async def test_the_address_of_an_image_is_sent_as_it_is(fake: FakeOpenAI) -> None:
    async with at(fake) as backend:
        await look.run(backend=backend)
    part = fake.bodies[0]["messages"][0]["content"][1]
    assert part == {"type": "image_url", "image_url": {"url": "https://example.org/a.png?x=1"}}


async def test_more_arguments_go_with_each_call(fake: FakeOpenAI) -> None:
    more = {
        "service_tier": "flex",
        "extra_headers": {"x-mine": "yes"},
        "extra_body": {"seed": 7},
        "timeout": 5.0,
    }
    async with at(fake, request_args=more) as backend:
        await ask.run(backend=backend)
    body = fake.bodies[0]
    assert (body["service_tier"], body["seed"]) == ("flex", 7)
    assert fake.seen[0].headers["x-mine"] == "yes"
    assert not {"extra_headers", "extra_body", "timeout"} & set(body)


def test_batches_are_as_wide_as_the_calls_that_may_run() -> None:
    widths = {
        concurrency: OpenAI("gpt-4", api_key=KEY, concurrency=concurrency).default_concurrency
        for concurrency in (None, 7, "auto")
    }
    assert widths == {None: 64, 7: 7, "auto": 1024}


def test_settings_are_checked_when_it_is_made() -> None:
    with pytest.raises(InvalidArgument, match="OPENAI_API_KEY"):
        OpenAI("gpt-4")
    with pytest.raises(InvalidArgument, match="AZURE_OPENAI_ENDPOINT"):
        OpenAI("gpt-4", is_azure=True, api_key=KEY)
    with pytest.raises(InvalidArgument, match="is_azure"):
        OpenAI("gpt-4", api_key=KEY, azure_endpoint="https://x.openai.azure.com")
    with pytest.raises(InvalidArgument, match="model_name"):
        OpenAI("", api_key=KEY)
    wrong: dict[str, Any] = {"timeout": 0, "max_retries": -1, "max_reasks": -1, "rpm": 0}
    for name, value in wrong.items():
        settings: dict[str, Any] = {name: value}
        with pytest.raises(InvalidArgument, match=name):
            OpenAI("gpt-4", api_key=KEY, **settings)


def test_backends_from_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for sdk in ("anthropic", "google.genai"):
        pytest.importorskip(sdk)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://x.openai.azure.com")
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    made = {
        spec: repr(sgl.backend_from_spec(spec))
        for spec in ("openai:gpt-5.5", "azure:mine", "anthropic:claude-opus-4-6", "vertex:gemini-3")
    }
    assert made == {
        "openai:gpt-5.5": "<OpenAI 'gpt-5.5'>",
        "azure:mine": "<OpenAI 'mine'>",
        "anthropic:claude-opus-4-6": "<Anthropic 'claude-opus-4-6'>",
        "vertex:gemini-3": "<VertexAI 'gemini-3'>",
    }
    assert sgl.backend_from_spec("openai:gpt-5.5", rpm=60).name == "openai"
