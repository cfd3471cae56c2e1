"""The chat formats that go by a name.

The strings are the models' published formats, by the names that SGLang's frontend
(``lang/chat_template.py`` there) gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, Unpack

from .template import NamedTemplate

__all__ = ["TEMPLATES"]

Turn = tuple[str, str]


class _Options(TypedDict, total=False):
    default_system: str | None
    system_inside_user: bool
    begin: str
    stop: tuple[str, ...]
    image_token: str
    video_token: str


def _make(
    name: str, system: Turn, user: Turn, assistant: Turn, **options: Unpack[_Options]
) -> NamedTemplate:
    turns: Mapping[str, Turn] = {"system": system, "user": user, "assistant": assistant}
    return NamedTemplate(
        name,
        {role: turn[0] for role, turn in turns.items()},
        {role: turn[1] for role, turn in turns.items()},
        **options,
    )


def _headers(name: str, form: str, end: str, **options: Unpack[_Options]) -> NamedTemplate:
    """A format whose turns differ only in the role's name."""
    turns = [(form.format(role=role), end) for role in ("system", "user", "assistant")]
    return _make(name, *turns, **options)


def _chatml(name: str, **options: Unpack[_Options]) -> NamedTemplate:
    options.setdefault("stop", ("<|im_end|>",))
    return _headers(name, "<|im_start|>{role}\n", "<|im_end|>\n", **options)


_LLAMA_3 = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_QWEN_SYSTEM = "You are a helpful assistant."
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

_ALL = (
    _make("default", ("SYSTEM:", "\n"), ("USER:", "\n"), ("ASSISTANT:", "\n")),
    _make("claude", ("", ""), ("\n\nHuman: ", ""), ("\n\nAssistant:", "")),
    _chatml("chatml"),
    _chatml("chatml-llava", default_system="Answer the questions.", image_token="<image>\n"),
    _chatml("qwen", default_system=_QWEN_SYSTEM),
    _chatml(
        "qwen2-vl",
        default_system=_QWEN_SYSTEM,
        image_token=_QWEN_IMAGE,
        video_token="<|vision_start|><|video_pad|><|vision_end|>",
    ),
    _make(
        "vicuna_v1.1",
        ("", " "),
        ("USER:", " "),
        ("ASSISTANT:", "</s>"),
        default_system=_VICUNA_SYSTEM,
        image_token=" <image>\n",
    ),
    _make(
        "llama-2-chat",
        ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
        ("[INST] ", " [/INST]"),
        ("", " </s><s>"),
        system_inside_user=True,
    ),
    _make(
        "mistral",
        ("[SYSTEM_PROMPT] ", " [/SYSTEM_PROMPT]"),
        ("[INST] ", " [/INST]"),
        ("", " </s><s>"),
        image_token="[IMG]",
        stop=("</s>",),
    ),
    _headers(
        "llama-3-instruct",
        _LLAMA_3,
        "<|eot_id|>",
        begin="<|begin_of_text|>",
        stop=("<|eot_id|>",),
        image_token="<|image|>",
    ),
    _headers(
        "llama-3-instruct-llava",
        _LLAMA_3,
        "<|eot_id|>",
        stop=("<|eot_id|>",),
        image_token="<image>\n",
    ),
    _headers(
        "llama-4",
        "<|header_start|>{role}<|header_end|>\n\n",
        "<|eot|>",
        begin="<|begin_of_text|>",
        stop=("<|eot|>",),
        image_token="<|image|>",
    ),
    _chatml("yi-1.5"),
    _make(
        "yi-vl",
        ("", "\n\n"),
        ("### Human:", "\n"),
        ("### Assistant:", "\n"),
        default_system=(
            "This is a chat between an inquisitive human and an AI assistant. Assume the role "
            "of the AI assistant. Read all the images carefully, and respond to the human's "
            "questions with informative, helpful, detailed and polite answers. 这是一个好奇的人类"
            "和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像,并对人类的"
            "问题做出信息丰富、有帮助、详细的和礼貌的回答。"
        ),
        image_token=" <image_placeholder>\n",
    ),
    _make(
        "gemma-it",
        ("", ""),
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        begin="<bos>",
        stop=("<end_of_turn>",),
        image_token="<start_of_image>",
    ),
    _chatml(
        "dbrx-instruct",
        default_system=(
            "You are DBRX, created by Databricks. You were last updated in December 2023."
        ),
    ),
    _make(
        "c4ai-command-r",
        ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        stop=("<|END_OF_TURN_TOKEN|>",),
    ),
    _chatml("internvl-2-5", image_token="<image>"),
    _headers(
        "granite-3-instruct",
        "<|start_of_role|>{role}<|end_of_role|>",
        "<|end_of_text|>",
        stop=("<|end_of_text|>",),
    ),
    _make(
        "deepseek-v3",
        ("", ""),
        ("<｜User｜>", ""),
        ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        begin="<｜begin▁of▁sentence｜>",
        stop=("<｜end▁of▁sentence｜>",),
    ),
    _headers(
        "glm-4v",
        "<|{role}|>\n",
        "",
        begin="[gMASK]<sop>",
        stop=("<|user|>", "<|endoftext|>", "<|observation|>"),
        image_token="<|begin_of_image|><|image|><|end_of_image|>",
    ),
    _chatml("minicpmv", image_token="(<image>./</image>)", video_token="(<video>./</video>)"),
    _make(
        "janus-pro",
        ("", "\n\n"),
        ("<|User|>: ", "\n\n"),
        ("<|Assistant|>: ", "<｜end▁of▁sentence｜>"),
        stop=("<｜end▁of▁sentence｜>",),
        image_token="<image_placeholder>\n",
    ),
)

TEMPLATES: Mapping[str, NamedTemplate] = {template.name: template for template in _ALL}
