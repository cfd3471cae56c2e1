"""What RuntimeEndpoint sends to an SGLang server, and what it makes of the answers."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import asyncsgl as sgl
from asyncsgl import RuntimeEndpoint
from asyncsgl.program.prefix import prefix_request
from asyncsgl.testing_server import FakeServer, Refuse
from asyncsgl.testing_server.model import FakeModel
from asyncsgl.types import Constraint, SamplingOverrides, SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("http_library")]

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@sgl.function
async def ask(s: sgl.ProgramState, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=16))


@sgl.function
async def complete(s: sgl.ProgramState, text: str) -> None:
    s += text + sgl.gen("rest")


async def test_a_program_runs_on_a_server() -> None:
    async with FakeServer({"Peru": "It is Lima."}) as server, RuntimeEndpoint(server.url) as there:
        state = await ask.run(question="What is the capital of Peru?", backend=there)
    assert state["answer"] == "It is Lima."
    meta = state.meta("answer")
    assert isinstance(meta, sgl.Meta)
    assert (meta.finish_reason, meta.matched_stop, meta.completion_tokens) == ("stop", 2, 4)
    assert (meta.backend, meta.model) == ("endpoint", "fake/model-chat")
    assert meta.prompt_tokens == state.usage.prompt_tokens > 0
    assert meta.timings.total > 0


async def test_every_field_goes_by_the_servers_name() -> None:
    given: SamplingOverrides = {
        "max_tokens": 9,
        "min_tokens": 1,
        "stop": ["END", "."],
        "stop_token_ids": [5],
        "stop_regex": ["a+"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "logit_bias": {3: 1.5},
        "seed": 11,
    }
    async with FakeServer("ok") as server, RuntimeEndpoint(server.url) as there:
        await complete.run(text="Say", backend=there, **given)
    [body] = server.generates()
    assert body["text"] == "Say"
    assert body["sampling_params"] == {
        "max_new_tokens": 9,
        "min_new_tokens": 1,
        "stop": ["END", "."],
        "stop_token_ids": [5],
        "stop_regex": ["a+"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "logit_bias": {"3": 1.5},
        "sampling_seed": 11,
    }
    assert "return_logprob" not in body


async def test_nothing_unset_is_sent() -> None:
    async with FakeServer("ok") as server, RuntimeEndpoint(server.url) as there:
        await complete.run(text="Say", backend=there)
    [body] = server.generates()
    assert set(body) == {"text", "sampling_params", "rid"}
    assert body["sampling_params"] == {}


async def test_ids_are_our_own_and_of_one_length() -> None:
    async with FakeServer("ok") as server, RuntimeEndpoint(server.url) as there:
        states = [await complete.run(text="Say", backend=there) for _ in range(11)]
    rids = [body["rid"] for body in server.generates()]
    assert len(set(rids)) == 11
    assert {len(rid) for rid in rids} == {32}
    metas = [state.meta("rest") for state in states]
    assert [meta.request_id for meta in metas if isinstance(meta, sgl.Meta)] == rids


@pytest.mark.parametrize(
    ("constraint", "key", "value"),
    [
        (Constraint("regex", "a|b"), "regex", "a|b"),
        (Constraint("json_schema", '{"type":"object"}'), "json_schema", '{"type":"object"}'),
        (Constraint("ebnf", 'root ::= "a"'), "ebnf", 'root ::= "a"'),
    ],
)
async def test_constraints_are_sent_as_text(constraint: Constraint, key: str, value: str) -> None:
    async with FakeServer("a") as server, RuntimeEndpoint(server.url) as there:
        await there.generate(replace(prefix_request("Say"), constraint=constraint))
    [body] = server.generates()
    assert body["sampling_params"][key] == value


async def test_several_answers() -> None:
    async with FakeServer(["one"]) as server, RuntimeEndpoint(server.url) as there:
        state = await complete.run(text="Say", backend=there, n=3)
    assert state["rest"] == ["one"] * 3
    [body] = server.generates()
    assert body["sampling_params"] == {"n": 3}
    assert "rid" not in body  # the server would replace it


async def test_several_answers_of_one_seed_differ() -> None:
    async with FakeServer(["one", "two", "three"]) as server, RuntimeEndpoint(server.url) as there:
        state = await complete.run(text="Say", backend=there, n=3, seed=40)
    assert state["rest"] == ["one", "two", "three"]
    [body] = server.generates()
    assert body["text"] == ["Say"] * 3
    assert [params["sampling_seed"] for params in body["sampling_params"]] == [40, 41, 42]


async def test_logprobs() -> None:
    model = FakeModel("Lima now", logprob=lambda before, _: -float(len(before)))
    async with FakeServer(model=model) as server, RuntimeEndpoint(server.url) as there:
        state = await complete.run(
            text="The capital",
            backend=there,
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=2,
            return_text_in_logprobs=True,
        )
    meta = state.meta("rest")
    assert isinstance(meta, sgl.Meta)
    assert meta.logprobs is not None
    assert meta.prompt_logprobs is not None
    assert [(entry.logprob, entry.text) for entry in meta.logprobs] == [
        (-2.0, "Lima"),
        (-3.0, " now"),
    ]
    assert [len(entry.top) for entry in meta.logprobs] == [2, 2]
    assert (meta.prompt_logprobs[0].logprob, meta.prompt_logprobs[0].text) == (None, "The")
    assert meta.prompt_logprobs[1].logprob == -1.0


async def test_a_prompt_that_is_only_computed_has_no_logprobs() -> None:
    async with FakeServer("x") as server, RuntimeEndpoint(server.url) as there:
        sampling = SamplingParams(max_tokens=0, return_logprob=True)
        generation = await there.generate(replace(prefix_request("Say"), sampling=sampling))
    assert generation.completions[0].logprobs == ()
    assert generation.completions[0].finish_reason == "length"


async def test_stop_and_length() -> None:
    async with FakeServer("a b. c d") as server, RuntimeEndpoint(server.url) as there:
        state = await complete.run(text="Say", backend=there, stop=".")
        short = await complete.run(text="Say", backend=there, max_tokens=1)
    meta, cut = state.meta("rest"), short.meta("rest")
    assert isinstance(meta, sgl.Meta)
    assert isinstance(cut, sgl.Meta)
    assert (state["rest"], meta.matched_stop) == ("a b", ".")
    assert (short["rest"], cut.finish_reason) == ("a", "length")


async def test_images_are_a_list_in_their_order(tmp_path: Path) -> None:
    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        s += sgl.user("A " + sgl.image(PNG) + " B " + sgl.image("https://example.org/b.png"))
        s += sgl.assistant(sgl.gen("seen"))

    async with (
        FakeServer("dots") as server,
        RuntimeEndpoint(server.url, chat_template_name="chatml-llava") as there,
    ):
        await look.run(backend=there)
        await look.run(backend=there, n=2)
        await look.run(backend=there, n=2, seed=1)
    one, samples, several = server.generates()
    images = [
        f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
        "https://example.org/b.png",
    ]
    assert one["image_data"] == images
    assert one["text"].count("<image>") == 2
    assert samples["image_data"] == [images]  # a batch of one prompt, which has all images
    assert len(samples["text"]) == 1
    assert several["image_data"] == [images, images]


async def test_images_are_refused_for_a_model_of_text() -> None:
    @sgl.function
    async def look(s: sgl.ProgramState) -> None:
        s += sgl.user(sgl.image(PNG))
        s += sgl.assistant(sgl.gen("seen"))

    info = {"model_path": "only/text-chat", "has_image_understanding": False}
    async with FakeServer("x", model_info=info) as server, RuntimeEndpoint(server.url) as there:
        with pytest.raises(sgl.UnsupportedFeature, match=r"only/text-chat.* takes only text"):
            await look.run(backend=there)
    assert server.generates() == []


# -- templates ----------------------------------------------------------------------------------

JINJA = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("info", "prompt"),
    [
        (
            {"model_path": "x", "chat_template": JINJA, "special_tokens": {"eos_token": "</s>"}},
            "<user>Hi</s><assistant>",
        ),
        (
            {"model_path": "Qwen/Qwen2.5-7B-Instruct"},
            (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            ),
        ),
        (
            {"model_path": "meta-llama/Llama-3.1-8B-Instruct"},
            (
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
        ),
        ({"model_path": "who/knows"}, "USER:Hi\nASSISTANT:"),
        ({}, "USER:Hi\nASSISTANT:"),
        (None, "USER:Hi\nASSISTANT:"),
    ],
)
async def test_the_prompt_has_the_models_own_form(
    info: Mapping[str, object] | None, prompt: str
) -> None:
    async with FakeServer("x", model_info=info) as server, RuntimeEndpoint(server.url) as there:
        await ask.run(question="Hi", backend=there)
    assert server.generates()[0]["text"] == prompt


async def test_a_named_template_wins_and_an_assigned_one_over_it() -> None:
    info = {"model_path": "x", "chat_template": JINJA}
    async with (
        FakeServer("x", model_info=info) as server,
        RuntimeEndpoint(server.url, None, True, "gemma-it") as there,
    ):
        await ask.run(question="Hi", backend=there)
        there.chat_template = sgl.get_chat_template("vicuna_v1.1")
        await ask.run(question="Hi", backend=there)
    first, second = (body["text"] for body in server.generates())
    assert first.startswith("<bos><start_of_turn>user\nHi")
    assert second.endswith("USER:Hi ASSISTANT:")


async def test_an_unknown_form_of_turns_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeServer("x", model_info=None) as server, RuntimeEndpoint(server.url) as there:
        await complete.run(text="no turns here", backend=there)
        assert caplog.messages == []
        for _ in range(2):
            await ask.run(question="Hi", backend=there)
    [said] = caplog.messages
    assert "pass chat_template_name=" in said


async def test_an_unknown_template_name_is_refused_at_once() -> None:
    with pytest.raises(sgl.InvalidArgument, match=r"did you mean.*chatml"):
        RuntimeEndpoint("http://localhost:1", chat_template_name="chatlm")


async def test_the_model_is_asked_for_once_and_by_its_old_name_too() -> None:
    async with FakeServer("x", old_names=True) as server, RuntimeEndpoint(server.url) as there:
        assert server.requests == []
        await ask.run_batch([{"question": str(i)} for i in range(20)], backend=there)
    asked = [request.path for request in server.requests if request.method == "GET"]
    assert asked == ["/model_info", "/get_model_info"]


async def test_an_empty_prompt_begins_with_the_token_that_begins_texts() -> None:
    @sgl.function
    async def nothing(s: sgl.ProgramState) -> None:
        s += sgl.gen("text")

    info = {"model_path": "x", "special_tokens": {"bos_token": "<s>"}}
    async with FakeServer("x", model_info=info) as server, RuntimeEndpoint(server.url) as there:
        await nothing.run(backend=there)
    assert server.generates()[0]["text"] == "<s>"


async def test_an_empty_prompt_goes_only_to_a_model_that_begins_by_itself() -> None:
    model = FakeModel("x", begin="<s>")
    async with FakeServer(model=model) as server, RuntimeEndpoint(server.url) as there:
        found = await there.generate(prefix_request(""))
    assert found.usage.prompt_tokens == 1
    assert [body["text"] for body in server.generates()] == [""]
    async with FakeServer("x") as server, RuntimeEndpoint(server.url) as there:
        for _ in range(2):
            with pytest.raises(sgl.BadRequestError, match="put text before"):
                await there.generate(prefix_request(""))
            with pytest.raises(sgl.BadRequestError, match="put text before"):
                await anext(there.stream(prefix_request("")))
    asked = [request.path for request in server.requests]
    assert asked == ["/model_info", "/v1/tokenize"]


@pytest.mark.parametrize("deterministic", [False, True])
async def test_it_says_where_a_seed_changes_nothing(deterministic: bool) -> None:
    @sgl.function
    async def drawn(s: sgl.ProgramState) -> None:
        s += "Draw" + sgl.gen("one", seed=3) + sgl.gen("two")

    async with (
        FakeServer("x", deterministic=deterministic) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        state = await drawn.run(backend=there)
        again = await drawn.run(backend=there)
    for one in (state.meta("one"), again.meta("one")):
        assert ("seed: ignored" in str(one.emulated)) is not deterministic
    assert state.meta("two").emulated == ()
    assert [request.path for request in server.requests].count("/server_info") == 1


async def test_what_a_pattern_matched_is_cut_off() -> None:
    @sgl.function
    async def stopped(s: sgl.ProgramState) -> None:
        s += "Say" + sgl.gen("text", stop_regex=["q+", "t[hw]"])

    async with FakeServer("one two three") as server, RuntimeEndpoint(server.url) as there:
        state = await stopped.run(backend=there)
        async with stopped.stream(backend=there) as run:
            pieces = [piece async for piece in run.text("text")]
            streamed = await run.result()
    for one in (state, streamed):
        assert one["text"] == "one "
        assert one.meta("text").matched_stop == "t[hw]"
        assert one.meta("text").emulated == ("stop_regex: the text is cut here",)
    assert pieces == ["one "]
    own = {"model_path": "x", "cuts_stop_regex": True}
    async with FakeServer("one", model_info=own) as server, RuntimeEndpoint(server.url) as there:
        assert (await stopped.run(backend=there)).meta("text").emulated == ()


# -- addresses and keys ---------------------------------------------------------------------------


async def test_the_key_is_sent_and_never_shown() -> None:
    key = "sk-very-secret"
    async with (
        FakeServer("x", api_key=key) as server,
        RuntimeEndpoint(server.url + "/", key) as there,
    ):
        state = await ask.run(question="Hi", backend=there)
        assert state["answer"] == "x"
        assert key not in repr(there) + str(vars(there)) + str(there.statistics())
        async with RuntimeEndpoint(server.url, "sk-other-secret") as wrong:
            with pytest.raises(sgl.AuthenticationError) as caught:
                await ask.run(question="Hi", backend=wrong)
    assert caught.value.status == 401
    assert "Unauthorized" in str(caught.value)
    assert "secret" not in str(caught.value) + repr(caught.value)


async def test_user_info_is_sent_as_basic_authentication_and_never_shown() -> None:
    async with FakeServer("x", faults=[Refuse(400, {"error": "no"})]) as server:
        url = server.url.replace("://", "://ann:pass%40word@")
        async with RuntimeEndpoint(url) as there:
            with pytest.raises(sgl.BadRequestError) as caught:
                await ask.run(question="Hi", backend=there)
            shown = repr(there) + there.base_url + str(vars(there)) + str(caught.value)
    assert "ann" not in shown
    assert "pass" not in shown
    expected = "Basic " + base64.b64encode(b"ann:pass@word").decode()
    assert {request.headers["authorization"] for request in server.requests} == {expected}


@pytest.mark.parametrize(
    "url", ["", "localhost:30000", "ftp://host", "http://", "http://h:99999", "http://h/?a=1"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(sgl.InvalidArgument, match="base_url"):
        RuntimeEndpoint(url)


@pytest.mark.parametrize("key", ["a\r\nX-Admin: yes", "clé"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(sgl.InvalidArgument, match="api_key") as caught:
        RuntimeEndpoint("http://h:1", api_key=key)
    assert key not in str(caught.value)


def test_arguments_out_of_range_are_refused() -> None:
    for arguments in ({"timeout": 0}, {"max_connections": 0}, {"max_retries": -1}):
        with pytest.raises(sgl.InvalidArgument, match=next(iter(arguments))):
            RuntimeEndpoint("http://h", **arguments)  # type: ignore[arg-type]


async def test_a_path_before_the_routes_is_kept() -> None:
    async with FakeServer("x") as server, RuntimeEndpoint(server.url + "/models/a/") as there:
        with pytest.raises(sgl.NotFoundError):
            await ask.run(question="Hi", backend=there)
    assert "/models/a/generate" in {request.path for request in server.requests}


# -- capabilities ---------------------------------------------------------------------------------


async def test_what_cannot_be_done_is_refused_before_anything_is_sent() -> None:
    async with FakeServer("x") as server, RuntimeEndpoint(server.url) as there:
        assert there.capabilities.support("video") == "refused"
        assert there.capabilities.support("select") == "native"
        assert there.capabilities.support("reasoning") == "emulated"
        assert there.keeps_prefixes
    assert server.requests == []


async def test_a_prompt_can_be_computed_ahead() -> None:
    async with FakeServer("x") as server, RuntimeEndpoint(server.url) as there:
        await sgl.cache_prefix("A long beginning", there)
    [body] = server.generates()
    assert body["text"] == "A long beginning"
    assert body["sampling_params"] == {"max_new_tokens": 0}


async def test_counters() -> None:
    faults = [Refuse(503, {"error": {"message": "full"}})]
    async with FakeServer("x", faults=faults) as server, RuntimeEndpoint(server.url) as there:
        await ask.run(question="Hi", backend=there)
        assert there.statistics() == {"requests": 2, "retries": 1}


def test_it_comes_from_an_address(tmp_path: Path) -> None:
    there = sgl.backend_from_spec("http://host:30000", api_key="k")
    assert isinstance(there, RuntimeEndpoint)
    assert repr(there) == "<RuntimeEndpoint 'http://host:30000'>"


# -- https ----------------------------------------------------------------------------------------


async def test_certificates(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    async with FakeServer("x", context=context) as server:
        for verify in (str(ca), False):
            async with RuntimeEndpoint(server.url, None, verify) as there:
                assert (await ask.run(question="Hi", backend=there))["answer"] == "x"
        async with RuntimeEndpoint(server.url) as strict:
            with pytest.raises(sgl.BackendConnectionError, match="certificate"):
                await ask.run(question="Hi", backend=strict)
        async with RuntimeEndpoint(server.url, verify=str(tmp_path / "none.pem")) as missing:
            with pytest.raises(sgl.InvalidArgument, match="verify"):
                await ask.run(question="Hi", backend=missing)
