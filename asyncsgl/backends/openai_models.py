"""What OpenAI's models take, by family, and what a service's refusals taught."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .base import Capabilities
from .calls import ParameterRejected
from .planning import Profile
from .schemas import OPENAI

__all__ = ["Learned", "can_decide", "is_completion_model", "is_reasoning_model", "profile_of"]

_COMPLETION = re.compile(r"(ft:)?(gpt-3\.?5-turbo-instruct|davinci-002|babbage-002|text-)")
_O_SERIES = re.compile(r"(ft:)?o\d")
_GPT = re.compile(r"(ft:)?gpt-(\d+)")
_DECIDING = re.compile(r"gpt-6-luna")

_COMMON = frozenset(
    {
        "max_tokens",
        "n",
        "stop",
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "seed",
        "return_logprob",
        "top_logprobs_num",
        "return_text_in_logprobs",
    }
)
_LOGPROBS = frozenset({"return_logprob", "top_logprobs_num", "return_text_in_logprobs"})
_PENALTIES = frozenset({"frequency_penalty", "presence_penalty"})
_WIRE_FIELDS = {
    "temperature": frozenset({"temperature"}),
    "top_p": frozenset({"top_p"}),
    "frequency_penalty": frozenset({"frequency_penalty"}),
    "presence_penalty": frozenset({"presence_penalty"}),
    "logit_bias": frozenset({"logit_bias"}),
    "seed": frozenset({"seed"}),
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
}
_DISPENSABLE = frozenset({"stop", "response_format", "n", "stream_options"})
_NOT_THERE = "the API has no such parameter: leave it out, or use a local Runtime"
_REASONING = "this model does not take it: leave it out, or choose a model without reasoning"
_HINTS = {
    "min_tokens": _NOT_THERE,
    "stop_token_ids": "use stop=, with strings",
    "top_k": "the API has no such parameter: use top_p",
    "min_p": "the API has no such parameter: use top_p",
    "repetition_penalty": "the API has no such parameter: use frequency_penalty",
    "ignore_eos": _NOT_THERE,
    "logprob_start_len": "the API gives no logprobs of the prompt: use a local Runtime",
    "ebnf": "use json_schema or regex, or a local Runtime",
    "video": "send frames of it with sgl.image(...)",
    "continue_assistant": (
        "a chat model cannot continue a turn: begin each assistant turn with its gen, or let one "
        "call write the whole turn with @sgl.function(num_api_spec_tokens=256)"
    ),
}


def is_completion_model(model: str) -> bool:
    """Whether the name is one of the models that take one text."""
    return _COMPLETION.match(model) is not None


def is_reasoning_model(model: str) -> bool:
    """Whether the name is one of the families that reason before they answer."""
    if _O_SERIES.match(model):
        return True
    found = _GPT.match(model)
    return found is not None and int(found[2]) >= 5 and "gpt-5-chat" not in model


def can_decide(model: str) -> bool:
    """Whether the model answers the Decisions API."""
    return _DECIDING.match(model) is not None


@dataclass(slots=True)
class Learned:
    """What the service refused, so that it is not sent again.

    Attributes:
        limit_name: the parameter for the most tokens, once one was refused.
        features: sampling fields that the model does not take.
        wire: other parameters and routes that it has not, and what it needs that is not here.
    """

    limit_name: str | None = None
    features: set[str] = field(default_factory=set[str])
    wire: set[str] = field(default_factory=set[str])

    def take(self, rejected: ParameterRejected) -> bool:
        """Remember a rejection; False if it leaves nothing else to try."""
        name = rejected.parameter.partition(".")[0]
        if name in ("max_tokens", "max_completion_tokens"):
            other = "max_completion_tokens" if name == "max_tokens" else "max_tokens"
            fresh = self.limit_name is None
            self.limit_name = other
            return fresh
        fields = _WIRE_FIELDS.get(name)
        if fields is not None:
            fresh = not fields <= self.features
            self.features |= fields
            return fresh
        return name in _DISPENSABLE and self.do_without(name)

    def do_without(self, name: str) -> bool:
        """Remember that the service has not this; False if that was known."""
        fresh = name not in self.wire
        self.wire.add(name)
        return fresh

    @property
    def reasons(self) -> bool:
        """Whether the model is one of those that reason: they refuse ``max_tokens``."""
        return self.limit_name == "max_completion_tokens"


def profile_of(
    model: str, *, chat: bool, reasoning: bool, effort: str | None, learned: Learned
) -> Profile:
    """What ``model`` takes.

    Args:
        model: its name.
        chat: it takes messages, not a text.
        reasoning: it reasons before it answers.
        effort: the reasoning effort that is asked for.
        learned: what it refused before.
    """
    if not chat:
        return _completion_profile(learned)
    fields, max_stops, hints = _COMMON, 4, dict(_HINTS)
    if reasoning:
        refused = _PENALTIES
        if _O_SERIES.match(model):
            refused |= {"temperature", "top_p"} | _LOGPROBS
        else:
            refused |= {"logit_bias"}
            if effort != "none":
                refused |= {"temperature", "top_p"} | _LOGPROBS
        fields, max_stops = fields - refused, 0
        hints |= dict.fromkeys(refused, _REASONING)
    fields -= learned.features
    hints |= dict.fromkeys(learned.features, "this model refused it before: leave it out")
    structured = "response_format" not in learned.wire
    if "stop" in learned.wire:
        max_stops = 0
    native = {"chat", "image", *fields}
    emulated = {"raw_text", "regex", "stop_regex", "reasoning"}
    decides = can_decide(model) and "decisions" not in learned.wire
    (native if decides else emulated).add("select")
    (native if structured else emulated).add("json_schema")
    if max_stops == 0:
        native.discard("stop")
        emulated.add("stop")
    return Profile(
        Capabilities(frozenset(native), frozenset(emulated), hints),
        max_stops=max_stops,
        max_answers=1 if "n" in learned.wire else 128,
        dialect=OPENAI if structured else None,
        default_max_tokens=None if reasoning or learned.reasons else 128,
        temperature=1.0 if reasoning else None,
    )


def _completion_profile(learned: Learned) -> Profile:
    native = {"raw_text", "continue_assistant", *(_COMMON - learned.features)}
    emulated = {"chat", "regex", "json_schema", "stop_regex", "reasoning"}
    (emulated if "echo" in learned.wire else native).add("select")
    hints = _HINTS | {"image": "completion models take text: use a chat model"}
    hints["video"] = hints["image"]
    return Profile(
        Capabilities(
            frozenset(native),
            frozenset(emulated),
            {name: hint for name, hint in hints.items() if name not in native},
            wants_text=True,
        ),
        max_stops=0 if "stop" in learned.wire else 4,
        max_answers=1 if "n" in learned.wire else 128,
        completion=True,
    )
