"""Decides what is sent for a request, and what is made here of what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import UnsupportedFeature
from ..types import GenRequest, Message, SamplingParams
from .base import Capabilities
from .calls import Call
from .forms import Form, form_of
from .schemas import Dialect

__all__ = ["Plan", "Profile", "folded", "instructed", "plan_call", "stripped"]

NEUTRAL: Mapping[str, object] = {
    "min_tokens": 0,
    "n": 1,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "ignore_eos": False,
    "return_logprob": False,
    "logprob_start_len": -1,
    "top_logprobs_num": 0,
    "return_text_in_logprobs": False,
}
"""Values that mean the same as leaving the field out."""

_EMPTY = ("stop", "stop_token_ids", "stop_regex", "logit_bias")


@dataclass(frozen=True, slots=True)
class Profile:
    """What one model takes.

    Args:
        capabilities: by feature.
        max_stops: how many stop strings it takes; 0 for none.
        visible_stops: stop strings of white space alone are refused.
        max_answers: the largest ``n`` of one call.
        dialect: of its structured output; None if it has none.
        default_max_tokens: sent where nobody says a number; None to send none.
        thinking_tokens: added to every limit, as the model's thinking counts there.
        completion: it takes one text, not messages.
        temperature: the only temperature that it takes; None for any.
    """

    capabilities: Capabilities
    max_stops: int = 4
    visible_stops: bool = False
    max_answers: int = 1
    dialect: Dialect | None = None
    default_max_tokens: int | None = 128
    thinking_tokens: int = 0
    completion: bool = False
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send, and what to do with the answers.

    Args:
        call: what is sent.
        copies: how often it is sent.
        stops: stop strings that are enforced here.
        patterns: stop patterns that are enforced here.
        form: what the text must look like; None for free text.
        emulated: what was emulated, in words.
    """

    call: Call
    copies: int = 1
    stops: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    form: Form | None = None
    emulated: tuple[str, ...] = ()

    def calls(self) -> list[Call]:
        """The calls to make: copies of one, each with a seed of its own where one is given."""
        seed = self.call.sampling.seed
        if self.copies == 1 or seed is None:
            return [self.call] * self.copies
        return [
            replace(self.call, sampling=replace(self.call.sampling, seed=seed + index))
            for index in range(self.copies)
        ]


@dataclass(slots=True)
class _Notes:
    words: list[str] = field(default_factory=list[str])

    def add(self, *words: str) -> None:
        self.words += [word for word in words if word]


def stripped(request: GenRequest, profile: Profile) -> GenRequest:
    """``request`` without fields that say what is so anyway."""
    sampling = request.sampling
    nothing = {
        name: None
        for name in sampling.given()
        if (name in NEUTRAL and getattr(sampling, name) == NEUTRAL[name])
        or (name in _EMPTY and not getattr(sampling, name))
    }
    if sampling.temperature is not None and sampling.temperature == profile.temperature:
        nothing["temperature"] = None
    return replace(request, sampling=replace(sampling, **nothing)) if nothing else request


def plan_call(request: GenRequest, profile: Profile, backend: str) -> Plan:
    """What to send for a stripped and checked ``request``.

    Raises:
        UnsupportedFeature: the request mixes what cannot be mixed there.
    """
    notes = _Notes()
    messages = _messages(request, profile, backend, notes)
    sampling, stops = _sampling(request.sampling, profile, notes)
    prefill = request.continue_assistant and bool(messages) and messages[-1].role == "assistant"
    if prefill and profile.capabilities.support("continue_assistant") == "emulated":
        messages = folded(messages)
        prefill = False
        notes.add("continue_assistant: folded into the user's turn")
    form = None
    text = request.text if profile.completion else None
    if request.constraint is not None:
        form = form_of(
            request.constraint,
            profile.dialect,
            structured=profile.dialect is not None and not profile.completion,
            open_turn=prefill,
        )
        notes.add(form.emulated)
        if form.schema is None and not profile.completion and not prefill:
            messages = instructed(messages, form.instruction())
        if form.in_object:
            stops = ()  # the object ends by itself
            sampling = replace(sampling, stop=None)
    n = request.sampling.n or 1
    one_by_one = n > profile.max_answers or (form is not None and not form.as_it_comes)
    if one_by_one and n > 1:
        notes.add(f"n: {n} calls")
    limit = request.sampling.max_tokens
    limit = profile.default_max_tokens if limit is None else limit
    call = Call(
        messages,
        replace(sampling, n=None if one_by_one or n == 1 else n, max_tokens=None, stop_regex=None),
        None if limit is None else limit + profile.thinking_tokens,
        request.request_id,
        text,
        form.schema if form is not None else None,
        form is not None and form.schema is not None,
        prefill,
    )
    return Plan(
        call,
        n if one_by_one else 1,
        stops,
        tuple(request.sampling.stop_regex or ()),
        form,
        tuple(notes.words),
    )


def instructed(messages: tuple[Message, ...], words: str) -> tuple[Message, ...]:
    """``messages`` with ``words`` at the end of the last user turn, or in one of their own."""
    if not messages or messages[-1].role != "user":
        return (*messages, Message("user", (words,)))
    *before, last = messages
    return (*before, Message("user", (*last.parts, f"\n\n{words}")))


def folded(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The open assistant turn as an instruction to begin the answer so."""
    *before, last = messages
    words = (
        "Your answer has begun as follows; give only what comes next, and do not repeat it:\n"
        f"{last.text}"
    )
    return instructed(tuple(before), words)


def _messages(
    request: GenRequest, profile: Profile, backend: str, notes: _Notes
) -> tuple[Message, ...]:
    messages = request.messages
    if request.continue_assistant and not messages[-1].parts:
        messages = messages[:-1]
    if profile.completion:
        return messages
    roles = {message.role for message in messages}
    if None not in roles:
        return messages
    spoken = tuple(
        message
        for message in messages
        if message.role is not None
        or any(not isinstance(p, str) or p.strip() for p in message.parts)
    )
    if all(message.role is not None for message in spoken) and spoken:
        return spoken  # white space between turns has no place in a chat API, and no meaning
    if roles == {None} and spoken:
        notes.add("raw_text: sent as one user message")
        return (Message("user", tuple(part for message in spoken for part in message.parts)),)
    raise UnsupportedFeature(
        backend, "raw_text", "put the text that is outside of all roles into sgl.user(...)"
    )


def _sampling(
    sampling: SamplingParams, profile: Profile, notes: _Notes
) -> tuple[SamplingParams, tuple[str, ...]]:
    """What to send, and the stop strings to enforce here."""
    stops = tuple(sampling.stop or ())
    here: tuple[str, ...] = ()
    if len(stops) > profile.max_stops:
        here, stops = stops, ()
    elif profile.visible_stops:
        here = tuple(stop for stop in stops if not stop.strip())
        stops = tuple(stop for stop in stops if stop.strip())
    if here:
        notes.add("stop: the stream is cut here")
    if sampling.stop_regex:
        notes.add("stop_regex: the stream is cut here")
    return replace(sampling, stop=stops or None), here
