"""Runs a program without a backend, to see what it would append."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ..errors import ProgramError
from ..lang.expr import Gen, Node, Ref, RoleBegin, RoleEnd, Select, TextNode
from ..lang.template import ChatTemplate
from ..types import Message
from .branch import Barrier, Branch, ForkPoint, Item, JoinPoint, Task
from .door import CoroutineDoor
from .interpreter import Interpreter
from .state import ProgramState
from .variable import Variable

__all__ = ["Traced", "TracedFork", "TracedJoin", "constant_prefix", "trace"]

_OPEN, _CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True, slots=True)
class TracedFork:
    """A fork, with what each of its branches appends."""

    branches: tuple[list[Traced], ...]


@dataclass(frozen=True, slots=True)
class TracedJoin:
    """A join of the fork before it."""

    mode: str


Traced = Node | TracedFork | TracedJoin


@dataclass
class _Recorder:
    """Takes the place of the interpreter: keeps nodes, and answers without a model."""

    nodes: dict[tuple[int, ...], list[Traced]] = field(default_factory=lambda: {(): []})

    def append(self, branch: Branch, items: Sequence[Item]) -> None:
        """Keep the nodes; every variable gets a placeholder for its text."""
        into = self.nodes[branch.path]
        for item in items:
            match item:
                case Task(node=node, variable=variable, reasoning=reasoning):
                    into.append(node)
                    for made in (variable, reasoning):
                        if made is not None:
                            text = _placeholder(made.name or "")
                            made.resolve(text, text, None)
                case JoinPoint(mode=mode, gathered=gathered, done=done):
                    into.append(TracedJoin(mode))
                    for target, sources in gathered:
                        values = [source.text if source else None for source in sources]
                        target.resolve(values, values, None)
                    done.resolve(None, None, None)
                case Barrier(done=done):
                    done.resolve(None, None, None)
                case ForkPoint():
                    pass

    def fork(self, parent: Branch, children: Sequence[Branch]) -> None:
        """Keep what the children append."""
        for child in children:
            self.nodes[child.path] = []
        self.nodes[parent.path].append(
            TracedFork(tuple(self.nodes[child.path] for child in children))
        )

    def cancel(self, branches: Iterable[Branch]) -> None:
        """Nothing is under way."""

    async def settled(self, branch: Branch) -> None:
        """Everything is done at once."""


class _TraceDoor(CoroutineDoor):
    """For any body: variables are known at once."""

    __slots__ = ("_is_coroutine",)

    def __init__(self, *, is_coroutine: bool) -> None:
        self._is_coroutine = is_coroutine

    def read(self, variable: Variable) -> Any:
        """The variable in a coroutine, its placeholder in a plain function."""
        return variable if self._is_coroutine else variable.text

    def ask(self, question: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The answer, or the coroutine that has it."""
        return question() if self._is_coroutine else _finish(question())


def _placeholder(name: str) -> str:
    return f"{_OPEN}{name}{_CLOSE}"


def trace(
    body: Callable[..., Any],
    parameters: Iterable[str],
    arguments: Mapping[str, object],
    *,
    tolerant: bool = False,
) -> list[Traced]:
    """What a program appends, in order.

    Arguments that are not given, and the variables that models would write, are texts that
    name them between two private-use characters (U+E000, U+E001).

    Args:
        body: the program's function.
        parameters: the names of its arguments.
        arguments: some of them, with values.
        tolerant: an exception of the program ends the trace instead of being raised.

    Raises:
        ProgramError: the program waits for something else than its own state.
    """
    recorder = _Recorder()
    door = _TraceDoor(is_coroutine=inspect.iscoroutinefunction(body))
    state = ProgramState(cast("Interpreter", recorder), Branch(), door)
    filled = {name: _placeholder(name) for name in parameters} | dict(arguments)
    try:
        result = body(state, **filled)
        if inspect.iscoroutine(result):
            _finish(result)
    except Exception:
        if not tolerant:
            raise
    return recorder.nodes[()]


def _finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never has to wait."""
    cause: Exception | None = None
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    except RuntimeError as error:
        if str(error) != "no running event loop":
            raise
        cause = error
    coroutine.close()
    raise ProgramError(
        "the program waits for something else than its state: it cannot be traced"
    ) from cause


def constant_prefix(nodes: Sequence[Traced], template: ChatTemplate) -> str:
    """The text that every run begins with, whatever its arguments and answers.

    Args:
        nodes: a trace with none of the arguments given.
        template: makes text of the turns.
    """
    branch = Branch()
    for node in nodes:
        match node:
            case TextNode(text=text):
                branch.parts.append(text)
            case Ref(source=source):
                branch.parts.append(_placeholder(source.name or ""))
            case RoleBegin(role=role):
                branch.begin(role)
            case RoleEnd():
                branch.close()
            case Gen() | Select():
                break
            case _:
                branch.parts.append(_OPEN)
                break
        last = branch.parts[-1] if branch.parts else ""
        if isinstance(last, str) and _OPEN in last:
            break
    messages: Sequence[Message] = branch.prompt()
    if not messages:
        return ""
    text = template.render(messages, continue_assistant=branch.role == "assistant")
    return text.partition(_OPEN)[0]
