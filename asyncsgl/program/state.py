"""The ``s`` of a program: what its body appends to and reads from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeGuard, Unpack

from ..errors import InvalidArgument, ProgramError, UnknownVariable
from ..lang.api import gen, select
from ..lang.choices import ChoicesMethod
from ..lang.expr import (
    ExprLike,
    Gen,
    Node,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    Select,
    TextNode,
    flatten,
)
from ..lang.reasoning import reasoning_variable
from ..types import Overrides, Role
from .branch import Branch, Item, Task
from .branches import Branches
from .result import turns
from .variable import Variable

if TYPE_CHECKING:
    from .door import Door
    from .interpreter import Interpreter

__all__ = ["ProgramState"]


class ProgramState:
    """One branch of a running program, as its body sees it.

    ``s += expr`` queues and returns at once; the branch executes in order. ``s["x"]`` is a
    future of the variable's text: ``await s["x"]``.
    """

    __slots__ = (
        "_branch",
        "_closed",
        "_door",
        "_forks",
        "_role",
        "_run",
        "_scopes",
        "_variables",
    )

    def __init__(self, run: Interpreter, branch: Branch, door: Door) -> None:
        self._run = run
        self._branch = branch
        self._door = door
        self._role: Role | None = None
        self._scopes: tuple[str, ...] = ()
        self._variables: dict[str, Variable] = {}
        self._forks = 0
        self._closed = False

    # -- appending --------------------------------------------------------------------

    def __iadd__(self, expr: ExprLike) -> Self:
        """Queue text, an expression, or a list of these.

        Raises:
            ProgramError: it cannot be appended here: a role in a role, a gen in a user turn,
                or this branch is joined already.
        """
        self._append(flatten(expr))
        return self

    def _append(self, nodes: Sequence[Node]) -> list[Item]:
        self._refuse_closed()
        self._check(nodes)
        items: list[Item] = [self._task(node) for node in nodes]
        if items:
            self._door.call(self._run.append, self._branch, items)
        return items

    def _check(self, nodes: Sequence[Node]) -> None:
        """Refuse what has no meaning here, before anything is queued."""
        role, scopes = self._role, self._scopes
        for node in nodes:
            match node:
                case TextNode():
                    pass
                case RoleBegin(role=begun):
                    if role is not None:
                        raise ProgramError(
                            f"{begun} cannot begin a turn inside the {role} turn: end that first"
                        )
                    role = begun
                case RoleEnd(role=ended):
                    if role != ended:
                        there = f"the open turn is {role}'s" if role else "no turn is open"
                        raise ProgramError(f"cannot end a {ended} turn: {there}")
                    role = None
                case Gen() | Select() if role in ("user", "system"):
                    kind = type(node).__name__.lower()
                    raise ProgramError(
                        f"{kind}({node.name!r}) stands in a {role} turn: models write assistant "
                        "turns, so put it in assistant(...), or outside of any role"
                    )
                case ScopeBegin(name=name) if name in scopes:
                    raise ProgramError(f"the scope {name!r} is open already")
                case ScopeBegin(name=name):
                    scopes = (*scopes, name)
                case ScopeEnd(name=name):
                    scopes = tuple(scope for scope in scopes if scope != name)
                case _:
                    pass
        self._role, self._scopes = role, scopes

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ProgramError(
                f"branch {self._branch.path} is joined already: append to its parent"
            )

    def _task(self, node: Node) -> Task:
        if isinstance(node, Gen):
            task = Task(node, self._define(node.name))
            if node.reasoning is not None and node.name is not None:
                task.reasoning = self._define(reasoning_variable(node.name))
            return task
        if isinstance(node, (Select, ScopeEnd)):
            return Task(node, self._define(node.name))
        return Task(node)

    def _define(self, name: str | None) -> Variable:
        variable = Variable(name)
        if name is not None:
            self._variables[name] = variable
        return variable

    def gen(
        self,
        name: str | None = None,
        *,
        dtype: object = None,
        choices: Sequence[str] | None = None,
        choices_method: ChoicesMethod | None = None,
        regex: str | None = None,
        json_schema: object = None,
        ebnf: str | None = None,
        **overrides: Unpack[Overrides],
    ) -> Any:
        """Append a generation; ``await`` it for its text. See :func:`asyncsgl.gen`."""
        node = gen(
            name,
            dtype=dtype,
            choices=choices,
            choices_method=choices_method,
            regex=regex,
            json_schema=json_schema,
            ebnf=ebnf,
            **overrides,
        )
        return self._append_and_read(node)

    def select(
        self,
        name: str | None = None,
        choices: Sequence[str] | None = None,
        temperature: float = 0.0,
        choices_method: ChoicesMethod | None = None,
    ) -> Any:
        """Append a choice; ``await`` it for the chosen text. See :func:`asyncsgl.select`."""
        return self._append_and_read(select(name, choices, temperature, choices_method))

    def _append_and_read(self, node: Gen | Select) -> Any:
        [item] = self._append([node])
        assert isinstance(item, Task) and item.variable is not None
        return self._door.read(item.variable)

    # -- roles and scopes -------------------------------------------------------------

    def system(self) -> Any:
        """``with s.system(): …`` puts what is appended in a system turn."""
        return self._turn("system")

    def user(self) -> Any:
        """``with s.user(): …`` puts what is appended in a user turn."""
        return self._turn("user")

    def assistant(self) -> Any:
        """``with s.assistant(): …`` puts what is appended in an assistant turn."""
        return self._turn("assistant")

    @contextmanager
    def _turn(self, role: Role) -> Iterator[None]:
        self._append([RoleBegin(role)])
        try:
            yield
        finally:
            if self._role == role and not self._closed:
                self._append([RoleEnd(role)])

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """``with s.var_scope("x"): …`` makes the text appended in it the variable ``x``."""
        if not name:
            raise InvalidArgument("name", "must be a non-empty string")
        self._append([ScopeBegin(name)])
        try:
            yield
        finally:
            if name in self._scopes and not self._closed:
                self._append([ScopeEnd(name)])

    # -- variables ----------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        """The variable: await it for its text.

        Raises:
            UnknownVariable: nothing that was appended so far defines it.
        """
        return self._door.read(self._find(name))

    def _find(self, name: str) -> Variable:
        variable = self._variables.get(name)
        if variable is None:
            raise UnknownVariable(name, self._variables)
        return variable

    def __contains__(self, name: object) -> bool:
        return name in self._variables

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def set(self, name: str, value: object) -> None:
        """Set a variable to a value of the program's own."""
        variable = self._define(name)
        variable.resolve(value, value, None)

    def value(self, name: str) -> Any:
        """The typed value of a variable, to be awaited.

        Raises:
            UnknownVariable: nothing defines it.
            OutputError: the text has no value of its type.
        """
        variable = self._find(name)

        async def typed() -> object:
            await variable.wait()
            return typed_value(variable)

        return self._door.ask(typed)

    def meta(self, name: str) -> Any:
        """How a variable came about (:class:`~asyncsgl.Meta`), to be awaited.

        Raises:
            UnknownVariable: nothing defines it.
        """
        variable = self._find(name)

        async def meta() -> object:
            await variable.wait()
            return variable.meta

        return self._door.ask(meta)

    # -- the whole ------------------------------------------------------------------------

    def sync(self) -> Any:
        """Wait until everything appended so far is done."""
        return self._door.ask(lambda: self._run.settled(self._branch))

    def text(self) -> Any:
        """The text so far, as the chat template writes it, to be awaited."""

        async def text() -> str:
            await self._run.settled(self._branch)
            template = await self._run.chat_template()
            open_turn = self._branch.role == "assistant"
            return template.render(self._branch.prompt(), continue_assistant=open_turn)

        return self._door.ask(text)

    def messages(self) -> Any:
        """The turns so far as ``{"role": …, "content": …}``, to be awaited."""

        async def messages() -> list[dict[str, Any]]:
            await self._run.settled(self._branch)
            return turns(self._branch.prompt())

        return self._door.ask(messages)

    # -- forks ------------------------------------------------------------------------------

    def fork(self, n: int = 1, position_ids_offset: object = None) -> Branches:  # noqa: ARG002
        """``n`` branches that start from here; nothing blocks.

        Args:
            n: how many, 1 or more.
            position_ids_offset: accepted for programs written for SGLang; has no effect.

        Raises:
            InvalidArgument: ``n`` is not a whole number of 1 or more.
        """
        if not is_count(n):
            raise InvalidArgument("n", f"must be a whole number, at least 1, got {n!r}")
        self._refuse_closed()
        first = self._forks
        self._forks += n
        children = tuple(
            Branch((*self._branch.path, first + index), gated=True) for index in range(n)
        )
        self._door.call(self._run.fork, self._branch, children)
        return Branches(self, [self._child(child) for child in children])

    def copy(self) -> Branches:
        """One branch that starts from here; the same as ``fork(1)``."""
        return self.fork(1)

    def _child(self, branch: Branch) -> ProgramState:
        child = ProgramState(self._run, branch, self._door)
        child._role = self._role
        child._scopes = self._scopes
        child._variables = dict(self._variables)
        return child

    # -- names of SGLang's frontend -----------------------------------------------------------

    def get_var(self, name: str) -> Any:
        """The same as ``s[name]``."""
        return self[name]

    def set_var(self, name: str, value: object) -> None:
        """The same as :meth:`set`."""
        self.set(name, value)

    def get_meta_info(self, name: str) -> Any:
        """The same as :meth:`meta`."""
        return self.meta(name)

    def __repr__(self) -> str:
        return f"<ProgramState branch={self._branch.path} variables={list(self._variables)}>"


def is_count(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def typed_value(variable: Variable) -> object:
    """The typed value of a finished variable.

    Raises:
        OutputError: the text has no value of its type.
    """
    value = variable.typed
    if isinstance(value, Exception):
        raise value
    return value
