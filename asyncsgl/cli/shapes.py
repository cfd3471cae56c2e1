"""The rows that need no program of the user's, and the programs that answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..batch.formats import JsonValue, RowError
from ..lang.api import assistant, assistant_begin, assistant_end, gen, image, system, user
from ..program.program import Program, function

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..lang.expr import Expr, ExprLike
    from ..program.state import ProgramState

__all__ = ["program_for"]

_TURNS: dict[str, Callable[[ExprLike], Expr]] = {
    "system": system,
    "user": user,
    "assistant": assistant,
}


@function
async def answer_question(s: ProgramState, question: str) -> None:
    """Answer briefly, so that small models keep to the point."""
    s += system("Answer the question in one short sentence.")
    s += user(question)
    s += assistant(gen("answer"))


@function
async def continue_prompt(s: ProgramState, prompt: str) -> None:
    """Go on with a text as it is."""
    s += prompt
    s += gen("answer")


@function
async def continue_messages(s: ProgramState, messages: list[dict[str, JsonValue]]) -> None:
    """Give the next turn of a conversation, or go on with its last one."""
    *before, last = messages
    open_turn = last["role"] == "assistant"
    for message in before if open_turn else messages:
        s += _TURNS[str(message["role"])](_content(message["content"]))
    s += assistant_begin()
    if open_turn:
        s += _content(last["content"])
    s += gen("answer")
    s += assistant_end()


_SHAPES: dict[str, Program] = {
    "prompt": continue_prompt,
    "messages": continue_messages,
    "question": answer_question,
}


def program_for(row: Mapping[str, JsonValue]) -> Program:
    """The program that answers a row of one of the known shapes.

    Raises:
        RowError: the row has none of them.
    """
    shapes = [key for key in _SHAPES if key in row]
    if len(shapes) != 1:
        found = " and ".join(shapes) or ", ".join(map(repr, row)) or "nothing"
        raise RowError(
            f'a row has one of "prompt", "messages" and "question", this one has {found}; '
            f"other arguments need a program"
        )
    if unknown := sorted(row.keys() - set(shapes)):
        raise RowError(f"unknown: {', '.join(unknown)}; other arguments need a program")
    [key] = shapes
    if key == "messages":
        _check_messages(row[key])
    elif not isinstance(row[key], str):
        raise RowError(f"{key!r} must be a text, got {row[key]!r:.80}")
    return _SHAPES[key]


def _check_messages(messages: JsonValue) -> None:
    if not isinstance(messages, list) or not messages:
        raise RowError("'messages' must be a list of at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise RowError(f'message {number} must be {{"role": …, "content": …}}')
        if message["role"] not in _TURNS:
            raise RowError(f"message {number}: the role must be one of {', '.join(_TURNS)}")
        content = message["content"]
        if not isinstance(content, (str, list)) or not all(map(_is_part, content)):
            raise RowError(
                f"message {number}: the content must be a text, or a list of "
                f'{{"type": "text", "text": …}} and '
                f'{{"type": "image_url", "image_url": {{"url": …}}}}'
            )


def _is_part(part: JsonValue) -> bool:
    match part:
        case str() | {"type": "text", "text": str()}:
            return True
        case {"type": "image_url", "image_url": {"url": str()}}:
            return True
        case _:
            return False


def _content(content: JsonValue) -> ExprLike:
    if isinstance(content, str):
        return content
    assert isinstance(content, Sequence)
    return [_part(part) for part in content]


def _part(part: JsonValue) -> ExprLike:
    match part:
        case {"text": str(text)}:
            return text
        case {"image_url": {"url": str(url)}}:
            return image(url)
        case _:
            raise AssertionError(f"not a checked part: {part!r}")
