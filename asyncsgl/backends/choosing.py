"""A choice among texts as a request: by a schema of them, or by asking for one of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from ..errors import OutputError
from ..types import Constraint, GenRequest, SamplingParams
from .planning import Profile, instructed

__all__ = ["choosing", "chosen"]


def choosing(
    request: GenRequest, choices: Sequence[str], profile: Profile
) -> tuple[GenRequest, tuple[str, ...]]:
    """The request that lets the model choose, and how, in words.

    What an open turn already says is told to the model. Sampling that the model does not take
    is left out: of a choice it changes only how it may vary.

    Args:
        request: what comes before the choice.
        choices: at least one text.
        profile: what the model takes.
    """
    messages = request.messages
    if request.continue_assistant:
        *before, last = messages
        messages = tuple(before)
        if last.parts:
            words = (
                f"Your answer begins with: {last.text}\n"
                "Say which of these comes next, word for word: "
                + "; ".join(map(json.dumps, choices))
            )
            messages = instructed(messages, words)
    longest = max(len(choice.encode()) for choice in choices)
    given = request.sampling.given()
    dropped = [name for name in given if profile.capabilities.support(name) == "refused"]
    kept = {name: getattr(request.sampling, name) for name in given if name not in dropped}
    if profile.default_max_tokens is not None:
        kept["max_tokens"] = longest + 32
    how = "a JSON schema of the choices" if _by_schema(profile) else "asking for one of the choices"
    return replace(
        request,
        messages=messages,
        sampling=SamplingParams(**kept),
        constraint=_constraint(choices, profile),
        continue_assistant=False,
    ), (f"select: by {how}", *(f"{name}: dropped" for name in dropped))


def chosen(text: str, choices: Sequence[str], profile: Profile, backend: str) -> int:
    """Which of ``choices`` the model's answer is.

    Raises:
        OutputError: it is none of them.
    """
    said = json.loads(text) if _by_schema(profile) and text.startswith('"') else text
    if said not in choices:
        raise OutputError(f"{backend} chose {said!r}, which is not {_label(choices)}")
    return list(choices).index(said)


def _by_schema(profile: Profile) -> bool:
    return profile.dialect is not None and not profile.completion


def _label(choices: Sequence[str]) -> str:
    return "one of " + ", ".join(choices)


def _constraint(choices: Sequence[str], profile: Profile) -> Constraint:
    if _by_schema(profile):
        source = json.dumps({"type": "string", "enum": list(choices)}, ensure_ascii=False)
        return Constraint("json_schema", source, _label(choices))
    pattern = "|".join(re.escape(choice) for choice in choices)
    return Constraint("regex", f"({pattern})", _label(choices))
