"""What an SGLang server says of its model, and the chat template for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..lang.chat_template import ChatTemplate, JinjaTemplate, get_chat_template

__all__ = ["ModelInfo", "guess_chat_template"]

_BY_PATH = (
    (r"deepseek-(v3|r1)(?!.*base)", "deepseek-v3"),
    (r"janus", "janus-pro"),
    (r"dbrx.*instruct", "dbrx-instruct"),
    (r"vicuna|llava-v1\.5|llava-next-video-7b", "vicuna_v1.1"),
    (r"llama-?2.*chat|codellama.*instruct", "llama-2-chat"),
    (r"pixtral|(mistral|mixtral|ministral).*instruct", "mistral"),
    (r"llama-?3.*llava|llava.*llama-?3", "llama-3-instruct-llava"),
    (r"llama-?3.*instruct", "llama-3-instruct"),
    (r"llama-?4", "llama-4"),
    (r"qwen.*vl", "qwen2-vl"),
    (r"glm[-_]?4(\.\d+)?v", "glm-4v"),
    (r"llava-v1\.6-(yi-)?34b|llava-next-video-34b|llava-onevision-qwen2", "chatml-llava"),
    (r"qwen.*(chat|instruct)", "qwen"),
    (r"tinyllama|smollm.*instruct", "chatml"),
    (r"yi-vl", "yi-vl"),
    (r"yi-1\.5.*chat", "yi-1.5"),
    (r"gemma.*it", "gemma-it"),
    (r"c4ai-command-r", "c4ai-command-r"),
    (r"granite.*instruct", "granite-3-instruct"),
    (r"internvl-?2[._-]5", "internvl-2-5"),
    (r"minicpm-?[vo]", "minicpmv"),
)


def guess_chat_template(model_path: str) -> ChatTemplate | None:
    """The named template that fits a model's path, as SGLang's frontend guesses; None for none."""
    for pattern, name in _BY_PATH:
        if re.search(pattern, model_path, re.IGNORECASE):
            return get_chat_template(name)
    return None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What ``/model_info`` says; old servers say little.

    Args:
        model_path: the model's path or name.
        special_tokens: ``bos_token`` and the like, by name.
        sees_images: whether the model takes images; None if the server does not say.
        cuts_patterns: whether a match of ``stop_regex`` is left out of the text; SGLang's own
            server leaves it in.
        template: the model's own, or else the one that its path hints at; None for none.
    """

    model_path: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    sees_images: bool | None = None
    cuts_patterns: bool = False
    template: ChatTemplate | None = None

    @classmethod
    def of(cls, body: Any) -> ModelInfo:
        """Read the answer of ``/model_info``."""
        given: dict[str, Any] = body if isinstance(body, dict) else {}
        path = str(given.get("model_path") or "")
        named = given.get("special_tokens")
        tokens = {
            name: token
            for name, token in (named.items() if isinstance(named, dict) else ())
            if isinstance(token, str)
        }
        source = given.get("chat_template")
        sees = given.get("has_image_understanding")
        own = JinjaTemplate(source, tokens) if isinstance(source, str) else None
        return cls(
            path,
            tokens,
            sees if isinstance(sees, bool) else None,
            given.get("cuts_stop_regex") is True,
            own or guess_chat_template(path),
        )

    @property
    def begin(self) -> str:
        """The text of the token that begins a text, or else ends one; ``""`` if not known."""
        return self.special_tokens.get("bos_token") or self.special_tokens.get("eos_token") or ""
