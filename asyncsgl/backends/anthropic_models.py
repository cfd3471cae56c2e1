"""What Anthropic's models take, by the version in their names, and what refusals taught."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .base import Capabilities
from .planning import Profile
from .schemas import ANTHROPIC

__all__ = ["ModelTraits", "profile_of", "traits_of"]

_NAME = re.compile(r"claude-(?:(?:opus|sonnet|haiku|instant)-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")
_THINKING = frozenset({"enabled", "adaptive"})
_THINKING_LIMIT = 4096
"""Tokens for thinking and answer where nobody says a number; the API wants one."""
_WHILE_THINKING = "the model takes no sampling parameters while it thinks: leave it out"
_SAMPLING = frozenset({"temperature", "top_p", "top_k"})
_NO_SAMPLING = "this model takes no sampling parameters: leave it out, or use one up to Claude 4.6"
_NOT_THERE = "the API has no such parameter: leave it out, or use a local Runtime"
_HINTS = {
    "min_tokens": _NOT_THERE,
    "seed": _NOT_THERE,
    "ignore_eos": _NOT_THERE,
    "frequency_penalty": _NOT_THERE,
    "presence_penalty": _NOT_THERE,
    "repetition_penalty": _NOT_THERE,
    "logit_bias": _NOT_THERE,
    "min_p": "the API has no such parameter: use top_p, where the model takes it",
    "stop_token_ids": "use stop=, with strings",
    "return_logprob": "the API gives no logprobs: use OpenAI or a local Runtime",
    "top_logprobs_num": "the API gives no logprobs: use OpenAI or a local Runtime",
    "logprob_start_len": "the API gives no logprobs: use a local Runtime",
    "return_text_in_logprobs": "the API gives no logprobs: use OpenAI or a local Runtime",
    "ebnf": "use json_schema or regex, or a local Runtime",
    "video": "send frames of it with sgl.image(...)",
}


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """How one model differs from the others.

    Args:
        sampling: it takes temperature, top_p and top_k.
        prefill: it continues an assistant turn that has begun.
        structured: it takes a JSON schema for its answer.
        thinking: it is told to think before it answers.
        thinking_tokens: that it may think with, where that is a number of its own.
    """

    sampling: bool
    prefill: bool
    structured: bool
    thinking: bool = False
    thinking_tokens: int = 0

    def told(self, thinking: object) -> ModelTraits:
        """The same model with the API's parameter ``thinking``.

        While it thinks it takes no sampling parameters and continues no turn. Its thinking
        counts as a part of ``max_tokens``.
        """
        if not isinstance(thinking, Mapping) or thinking.get("type") not in _THINKING:
            return self
        budget = thinking.get("budget_tokens")
        return replace(
            self,
            sampling=False,
            prefill=False,
            thinking=True,
            thinking_tokens=budget if isinstance(budget, int) else 0,
        )


def traits_of(model: str) -> ModelTraits:
    """What is known of ``model`` by its name; the newest rules for names that say nothing."""
    found = _NAME.search(model)
    if found is None:
        return ModelTraits(sampling=False, prefill=False, structured=True)
    version = (int(found[1]), int(found[2] or 0))
    return ModelTraits(
        sampling=version <= (4, 6), prefill=version <= (4, 5), structured=version >= (4, 5)
    )


def profile_of(traits: ModelTraits) -> Profile:
    """What a model with these traits takes."""
    native = {"chat", "image", "max_tokens", "stop"}
    emulated = {"raw_text", "select", "regex", "stop_regex", "n", "reasoning"}
    hints = dict(_HINTS)
    if traits.sampling:
        native |= _SAMPLING
    else:
        hints |= dict.fromkeys(_SAMPLING, _WHILE_THINKING if traits.thinking else _NO_SAMPLING)
    (native if traits.prefill else emulated).add("continue_assistant")
    (native if traits.structured else emulated).add("json_schema")
    return Profile(
        Capabilities(frozenset(native), frozenset(emulated), hints),
        max_stops=64,
        visible_stops=True,
        max_answers=1,
        dialect=ANTHROPIC if traits.structured else None,
        default_max_tokens=(
            _THINKING_LIMIT if traits.thinking and not traits.thinking_tokens else 128
        ),
        thinking_tokens=traits.thinking_tokens,
        temperature=None if traits.sampling else 1.0,
    )
