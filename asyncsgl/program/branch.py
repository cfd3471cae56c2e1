"""The data of one branch of a run: its text so far, its queue, how it stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..lang.expr import Node
from ..types import Message, Part, Role
from .variable import Variable

if TYPE_CHECKING:
    from .draft import Draft

__all__ = ["Barrier", "Branch", "ForkPoint", "Item", "JoinMode", "JoinPoint", "Mark", "Task"]

JoinMode = str
"""``"gather_variable"`` or ``"concate_and_append"``."""

Mark = tuple[int, int]
"""A place in a branch's text: how many messages are closed, how many parts are open."""


@dataclass(slots=True)
class Task:
    """A language node in the queue, with the variables that it will set."""

    node: Node
    variable: Variable | None = None
    reasoning: Variable | None = None


@dataclass(slots=True)
class ForkPoint:
    """Here the children start, from the parent as it is when its queue gets here."""

    children: tuple[Branch, ...]


@dataclass(slots=True)
class JoinPoint:
    """Here the parent waits for its children and takes over what they made."""

    children: tuple[Branch, ...]
    mode: JoinMode
    tolerant: bool
    gathered: tuple[tuple[Variable, tuple[Variable | None, ...]], ...]
    done: Variable


@dataclass(slots=True)
class Barrier:
    """Here nothing happens, but everything before it has happened."""

    done: Variable


Item = Task | ForkPoint | JoinPoint | Barrier


class Branch:
    """One branch. Only the interpreter changes it.

    Args:
        path: which branch it is: ``()`` is the program's main one, ``(2,)`` its third child.
        gated: it waits for its parent to come to the fork.

    Attributes:
        started: its task has begun to work.
        claimed: a join of the parent takes its failure.
        tolerated: that join keeps the failure from the parent.
        draft: what a call for its whole open turn wrote, for the turn's generations.
    """

    __slots__ = (
        "children",
        "claimed",
        "draft",
        "failure",
        "gated",
        "listeners",
        "messages",
        "origin",
        "origin_role",
        "parent",
        "parts",
        "path",
        "queue",
        "role",
        "scopes",
        "started",
        "task",
        "tolerated",
    )

    def __init__(self, path: tuple[int, ...] = (), *, gated: bool = False) -> None:
        self.path = path
        self.gated = gated
        self.messages: list[Message] = []
        self.role: Role | None = None
        self.parts: list[Part] = []
        self.scopes: dict[str, Mark] = {}
        self.queue: list[Item] = []
        self.task: asyncio.Task[Any] | None = None
        self.started = False
        self.failure: Exception | None = None
        self.claimed = False
        self.tolerated = False
        self.draft: Draft | None = None
        self.listeners: tuple[Callable[[Branch], None], ...] = ()
        self.parent: Branch | None = None
        self.children: tuple[Branch, ...] = ()
        self.origin: Mark = (0, 0)
        self.origin_role: Role | None = None

    @property
    def busy(self) -> bool:
        """Whether something is left to do in the queue."""
        return self.task is not None or self.gated or bool(self.queue)

    @property
    def idle(self) -> bool:
        """Whether everything that was queued has been executed, or has failed."""
        return not self.busy

    @property
    def handled(self) -> bool:
        """Whether a join takes the failure here, and it ends there or is handled further up."""
        if self.tolerated:
            return True
        return self.claimed and self.parent is not None and self.parent.handled

    def mark(self) -> Mark:
        """The place where the text ends now."""
        return len(self.messages), len(self.parts)

    def begin(self, role: Role) -> None:
        """Begin a turn."""
        self.close()
        self.role = role

    def close(self) -> None:
        """End the open turn or raw text."""
        if self.parts or self.role is not None:
            self.messages.append(Message(self.role, tuple(self.parts)))
        self.role = None
        self.parts = []

    def prompt(self) -> tuple[Message, ...]:
        """The text so far; the last message is the open one, if there is one."""
        if self.role is None and not self.parts:
            return tuple(self.messages)
        return (*self.messages, Message(self.role, tuple(self.parts)))

    @property
    def open_text(self) -> str:
        """The texts of the open turn."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def text_since(self, mark: Mark) -> str:
        """The texts after ``mark``, without role markers."""
        return "".join(part for part in self.parts_since(mark) if isinstance(part, str))

    def parts_since(self, mark: Mark) -> Iterator[Part]:
        """The parts after ``mark``."""
        closed, opened = mark
        for index, message in enumerate(self.messages[closed:]):
            yield from message.parts[opened:] if index == 0 else message.parts
        yield from self.parts[opened:] if closed == len(self.messages) else self.parts

    def start_from(self, parent: Branch) -> None:
        """Become a copy of ``parent`` as it is now."""
        self.messages = list(parent.messages)
        self.role = parent.role
        self.parts = list(parent.parts)
        self.scopes = dict(parent.scopes)
        self.origin = self.mark()
        self.origin_role = self.role
        self.gated = False

    def take_over(self, child: Branch) -> None:
        """Append what ``child`` wrote since the fork.

        Text that continues the turn that was open at the fork continues it here; turns that
        the child began are turns here.
        """
        closed, opened = child.origin
        messages = child.messages[closed:]
        if messages and (opened or child.origin_role is not None):
            self._continue(child.origin_role, messages[0].parts[opened:])
            self.close()
            messages = messages[1:]
        elif not messages and (child.parts[opened:] or child.role is not None):
            self._continue(child.origin_role, child.parts[opened:])
            return
        if messages:
            self.close()
            self.messages.extend(messages)
        if closed < len(child.messages) and (child.role is not None or child.parts):
            self._continue(child.role, child.parts)

    def _continue(self, role: Role | None, parts: Sequence[Part]) -> None:
        if self.role != role:
            self.close()
            self.role = role
        self.parts.extend(parts)

    def notify(self) -> None:
        """Tell the listeners that the branch has come to rest or has failed."""
        listeners, self.listeners = self.listeners, ()
        for listener in listeners:
            listener(self)

    def drop_draft(self) -> None:
        """Give up what a call for the open turn has written; its turn or the run is over."""
        if self.draft is not None:
            self.draft.close()
            self.draft = None

    def family(self) -> Iterator[Branch]:
        """This branch and all that came from it."""
        yield self
        for child in self.children:
            yield from child.family()
