"""Chat templates: the named formats, and models' own Jinja with the last turn left open."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import asyncsgl as sgl
from asyncsgl.lang.named_templates import TEMPLATES
from asyncsgl.testing import ScriptedBackend
from asyncsgl.types import Media, Message, Role

NAMES = [
    "default",
    "claude",
    "chatml",
    "chatml-llava",
    "qwen",
    "qwen2-vl",
    "vicuna_v1.1",
    "llama-2-chat",
    "mistral",
    "llama-3-instruct",
    "llama-3-instruct-llava",
    "llama-4",
    "yi-1.5",
    "yi-vl",
    "gemma-it",
    "dbrx-instruct",
    "c4ai-command-r",
    "internvl-2-5",
    "granite-3-instruct",
    "deepseek-v3",
    "glm-4v",
    "minicpmv",
    "janus-pro",
]


def chat(*turns: tuple[Role, str]) -> list[Message]:
    return [Message(role, (text,)) for role, text in turns]


CONVERSATION = chat(
    ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")
)

FORMATS = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama-3-instruct": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama-2-chat": (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]Hello </s><s>[INST] Bye [/INST]"
    ),
    "mistral": (
        "[SYSTEM_PROMPT] Be brief. [/SYSTEM_PROMPT][INST] Hi [/INST]Hello </s><s>[INST] Bye [/INST]"
    ),
    "gemma-it": (
        "<bos>Be brief.<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello"
        "<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
    "deepseek-v3": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜>"
        "<｜User｜>Bye<｜Assistant｜>"
    ),
    "vicuna_v1.1": "Be brief. USER:Hi ASSISTANT:Hello</s>USER:Bye ASSISTANT:",
}


def test_every_name_of_the_list_is_there() -> None:
    assert set(TEMPLATES) == set(NAMES)


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats(name: str) -> None:
    messages = [*CONVERSATION, Message("assistant", ())]
    text = sgl.get_chat_template(name).render(messages, continue_assistant=True)
    assert text == FORMATS[name]


@pytest.mark.parametrize("name", NAMES)
def test_an_open_turn_has_no_end_and_goes_on(name: str) -> None:
    template = sgl.get_chat_template(name)
    begun = [*CONVERSATION, *chat(("assistant", "So it"))]
    opened = template.render(begun, continue_assistant=True)
    assert opened.endswith("So it")
    assert template.render(begun) == opened + template.suffix("assistant")


def test_default_systems_and_image_tokens() -> None:
    qwen = sgl.get_chat_template("qwen")
    assert qwen.render(chat(("user", "x"))).startswith("<|im_start|>system\nYou are a helpful")
    assert qwen.render(chat(("system", "y"), ("user", "x"))).startswith("<|im_start|>system\ny")
    message = Message("user", ("a", Media("image"), "b"))
    assert sgl.get_chat_template("vicuna_v1.1").render([message]).endswith("USER:a <image>\nb ")


def test_raw_text_stands_as_it_is() -> None:
    raw = [Message(None, ("only text",))]
    for name in ("llama-3-instruct", "qwen", "gemma-it"):
        assert sgl.get_chat_template(name).render(raw) == "only text"
    assert sgl.JinjaTemplate("{{ bos }}never").render(raw) == "only text"


def test_unknown_names_give_the_near_ones_and_new_ones_can_be_registered() -> None:
    with pytest.raises(sgl.InvalidArgument, match=r"did you mean .*llama-3-instruct"):
        sgl.get_chat_template("llama3-instruct")
    mine = sgl.NamedTemplate("tests-own", {"user": "U:"}, {"user": "\n"})
    sgl.register_chat_template(mine)
    assert sgl.get_chat_template("tests-own") is mine
    assert mine.render(chat(("user", "x"))) == "U:x\n"


# -- Jinja, with transformers' own rendering as the oracle --------------------------------------

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPPING = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system turns') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set content = message.content.split('</think>')[-1] if not loop.last else message.content %}"
    "{{- '<A>' + content + '<end>' }}{%- elif message.role == 'system' %}{{- message.content }}"
    "{%- else %}{{- '<U>' + message.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<A><think>\n' }}{%- endif %}"
)
BLOCKS = (
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>\n"
    "{% endgeneration %}{% else %}{{ message.content }}<|end|>\n{% endif %}"
    "{% if loop.index > 50 %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
JINJA = {
    "default system": SMOLLM,
    "stripping": STRIPPING,
    "brackets": BRACKETS,
    "thinking": THINKING,
    "blocks": BLOCKS,
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
contents = st.text("ab\n .<é", min_size=1).filter(str.strip)


def oracle(source: str, messages: list[Message], **options: bool) -> str:
    turns = [{"role": m.role, "content": m.text} for m in messages]
    arguments: dict[str, Any] = {"chat_template": source, **options, **TOKENS}
    rendered: tuple[Any, Any] = render_jinja_template([turns], **arguments)  # type: ignore[assignment]
    text: str = rendered[0][0]
    return text


@pytest.mark.parametrize("style", JINJA)
@given(texts=st.lists(contents, min_size=1, max_size=4), system=st.booleans())
def test_jinja_is_as_transformers_renders_it(style: str, texts: list[str], system: bool) -> None:
    turns: list[tuple[Role, str]] = [
        ("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)
    ]
    if system and style != "brackets":
        turns.insert(0, ("system", "Be kind."))
    source, messages = JINJA[style], chat(*turns)
    template = sgl.JinjaTemplate(source, TOKENS)
    assert template.render(messages) == oracle(source, messages)
    if messages[-1].role == "assistant":
        opened = template.render(messages, continue_assistant=True)
        assert opened == oracle(source, messages, continue_final_message=True)
    else:
        begun = [*messages, Message("assistant", ())]
        opened = template.render(begun, continue_assistant=True)
        assert opened == oracle(source, messages, add_generation_prompt=True)
        empty = [*messages, Message("assistant", ("", ""))]
        assert template.render(empty, continue_assistant=True) == opened


def test_earlier_thinking_is_dropped_and_an_open_thought_goes_on() -> None:
    template = sgl.JinjaTemplate(THINKING)
    messages = chat(("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r"))
    messages += chat(("assistant", "<think>\nso"))
    assert template.render(messages, continue_assistant=True) == "<U>q<A>a<end><U>r<A><think>\nso"


def test_a_template_that_drops_what_is_to_go_on_is_an_error() -> None:
    dropping = THINKING.replace(" if not loop.last else message.content", "")
    messages = chat(("user", "q"), ("assistant", "<think>x</think>ab"))
    with pytest.raises(sgl.ProgramError, match="does not show an assistant turn as it is"):
        sgl.JinjaTemplate(dropping).render(messages, continue_assistant=True)
    hiding = "{% for message in messages %}x{% endfor %}"
    with pytest.raises(sgl.ProgramError, match="does not show"):
        sgl.JinjaTemplate(hiding).render(messages, continue_assistant=True)


def test_what_a_template_refuses_is_told() -> None:
    template = sgl.JinjaTemplate(BRACKETS, TOKENS, name="mine")
    with pytest.raises(sgl.ProgramError, match="'mine' refuses these messages: no system turns"):
        template.render(CONVERSATION)
    with pytest.raises(sgl.ProgramError, match="refuses"):
        sgl.JinjaTemplate("{{ 'a' + 1 }}").render(CONVERSATION)
    with pytest.raises(sgl.ProgramError, match="refuses"):
        sgl.JinjaTemplate("{% if %}").render(CONVERSATION)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{% set _ = messages.append(1) %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(sgl.ProgramError, match=r"refuses these messages: .*(unsafe|undefined)"):
        sgl.JinjaTemplate(source).render(CONVERSATION)


def test_helpers_of_templates() -> None:
    source = "{{ {'b': 1, 'a': 'é<'} | tojson }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}"
    assert sgl.JinjaTemplate(source).render(CONVERSATION) == '{"b": 1, "a": "é<"} {"a": 2, "b": 1}'
    year = sgl.JinjaTemplate("{{ strftime_now('%Y') }}").render(CONVERSATION)
    assert year.isdigit()
    extra = sgl.JinjaTemplate("{{ enable_thinking }}", arguments={"enable_thinking": False})
    assert extra.render(CONVERSATION) == "False"


def test_media_reach_the_template_as_parts() -> None:
    source = (
        "{% for part in messages[0].content %}"
        "{{ part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}"
    )
    message = Message("user", ("a", Media("image"), "b", Media("video")))
    assert sgl.JinjaTemplate(source).render([message]) == "a<image>b<video>"


@pytest.mark.anyio
async def test_a_backends_template_makes_the_prompt_and_the_states_text() -> None:
    from asyncsgl.backends.base import FEATURES

    @sgl.function
    async def program(s: sgl.ProgramState) -> Any:
        s += sgl.user("q") + sgl.assistant("Well, " + sgl.gen("x"))
        return await s.text()

    can = sgl.Capabilities(frozenset(FEATURES), wants_text=True)
    template = sgl.JinjaTemplate(SMOLLM)
    backend = ScriptedBackend("yes", capabilities=can, chat_template=template)
    state = await program.run(backend=backend)
    prompt = backend.requests[0].text
    assert prompt is not None
    assert prompt.endswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nWell, ")
    assert state.return_value == state.text() == prompt + "yes<|im_end|>\n"
    backend.chat_template = sgl.get_chat_template("claude")
    assert (await program.run(backend=backend)).text() == "\n\nHuman: q\n\nAssistant:Well, yes"
