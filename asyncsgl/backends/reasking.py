"""Asking again for an answer that has not the form that was asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from ..errors import OutputError
from ..types import Usage
from .calls import Call, Reply
from .forms import Form
from .planning import instructed

__all__ = ["formed"]


async def formed(
    call: Call,
    form: Form | None,
    ask: Callable[[Call], Awaitable[Reply]],
    *,
    max_reasks: int,
    backend: str,
) -> Reply:
    """A reply whose text has the form, asked for again while it has not.

    Args:
        call: the first one; those after it tell the model what failed.
        form: None for free text.
        ask: makes one call.
        max_reasks: how often to ask again.
        backend: the backend's name.

    Raises:
        OutputError: the last answer had not the form, either.
    """
    if form is None or form.as_it_comes:
        return await ask(call)
    first, usage, reason = call, Usage(), ""
    for _ in range(max_reasks + 1):
        reply = await ask(call)
        usage += reply.usage
        completion = reply.completions[0]
        try:
            text = form.read(completion.text)
        except ValueError as error:
            reason = str(error)
            if completion.finish_reason != "stop":
                return replace(reply, usage=usage)
        else:
            return replace(reply, completions=(replace(completion, text=text),), usage=usage)
        call = _corrected(first, form, completion.text, reason)
    raise OutputError(
        f"{backend} gave no answer of the form asked for in {max_reasks + 1} tries; "
        f"the last one: {reason}"
    )


def _corrected(call: Call, form: Form, bad: str, reason: str) -> Call:
    """The call that asks again."""
    if call.text is not None:
        return replace(call, text=form.preface(reason) + call.text)
    if call.prefill:
        *before, last = call.messages
        _, said = form.correction(bad, reason)
        return replace(call, messages=(*instructed(tuple(before), said.text), last))
    return call.followed_by(*form.correction(bad, reason))
