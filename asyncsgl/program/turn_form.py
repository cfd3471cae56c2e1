"""What the open assistant turn of a branch looks like, as far as its queue tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..lang.expr import Gen, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, Select, TextNode
from ..types import Message
from .branch import Branch, Item, Task
from .draft import Draft

__all__ = ["correction", "ends", "text_after", "upcoming"]


def _turn(queue: Sequence[Item]) -> Iterator[Task]:
    """The tasks up to the end of the open turn, as far as they are known."""
    for item in queue:
        if not isinstance(item, Task):
            return
        yield item
        if isinstance(item.node, (RoleBegin, RoleEnd)):
            return


def ends(queue: Sequence[Item]) -> bool:
    """Whether the whole of the open turn is known."""
    return any(isinstance(task.node, (RoleBegin, RoleEnd)) for task in _turn(queue))


def upcoming(queue: Sequence[Item]) -> list[Gen | Select]:
    """What is still to be generated in the open turn."""
    return [task.node for task in _turn(queue) if isinstance(task.node, (Gen, Select))]


def _texts(queue: Sequence[Item]) -> Iterator[str | Gen | Select]:
    """The open turn's texts and blanks, up to a text that is not known yet."""
    for task in _turn(queue):
        match task.node:
            case TextNode(text=text):
                yield text
            case Gen() | Select() as node:
                yield node
            case ScopeBegin() | ScopeEnd():
                pass
            case _:
                return


def text_after(queue: Sequence[Item]) -> str:
    """The program's text right behind this node."""
    text = ""
    for part in _texts(queue):
        if not isinstance(part, str):
            break
        text += part
    return text


def correction(
    branch: Branch, node: Gen | Select, draft: Draft, why: str
) -> tuple[Message, Message]:
    """The turns that tell the model what failed, and what is wanted."""
    form = branch.open_text + _blank(node)
    for part in _texts(branch.queue):
        form += part if isinstance(part, str) else _blank(part)
    said = (
        f"That answer cannot be used: {why}. Answer again, word for word in the form between the "
        "lines, with what is in angle brackets filled in, and nothing before or after it.\n"
        f"---\n{form}\n---"
    )
    return Message("assistant", (draft.text or "(nothing)",)), Message("user", (said,))


def _blank(node: Gen | Select) -> str:
    if isinstance(node, Select):
        return f"<{' or '.join(node.choices)}>"
    label = node.constraint.label if node.constraint is not None else ""
    return f"<{node.name or '...'}{f': {label}' if label else ''}>"
