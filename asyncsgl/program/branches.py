"""The children of a fork."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..errors import ProgramError
from ..lang.expr import Expr, ExprLike
from .branch import JoinPoint
from .joining import check_mode
from .variable import Variable

if TYPE_CHECKING:
    from .state import ProgramState

__all__ = ["Branches"]


class Branches:
    """The branches that ``s.fork(n)`` made; a sequence of ``n`` program states.

    ``branches += expr`` appends to all of them, ``branches += [a, b]`` one to each, and
    ``branches += lambda i: …`` what the function gives for each index. Leaving
    ``async with s.fork(n) as branches:`` joins them.
    """

    __slots__ = ("_before", "_joined", "_parent", "_states")

    def __init__(self, parent: ProgramState, states: Sequence[ProgramState]) -> None:
        self._parent = parent
        self._states = list(states)
        self._before = dict(parent._variables)
        self._joined: Any = None

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self._states)

    def __getitem__(self, index: int) -> ProgramState:
        return self._states[index]

    def __setitem__(self, index: int, state: ProgramState) -> None:
        if self._states[index] is not state:
            raise ProgramError("a branch cannot be replaced: append to it with +=")

    def __iadd__(self, other: ExprLike | Sequence[ExprLike] | Callable[[int], ExprLike]) -> Self:
        """Append to every branch.

        Raises:
            ProgramError: a list has another length than there are branches.
        """
        if isinstance(other, (list, tuple)):
            if len(other) != len(self):
                raise ProgramError(f"{len(other)} expressions for {len(self)} branches")
            for state, expr in zip(self._states, other, strict=True):
                state += expr
        elif callable(other) and not isinstance(other, Expr):
            for index, state in enumerate(self._states):
                state += other(index)
        else:
            for state in self._states:
                state += other
        return self

    def join(self, mode: str = "gather_variable", *, return_exceptions: bool = False) -> Any:
        """Wait for the branches and take over what they made; await it.

        Args:
            mode: ``"gather_variable"``: each variable that the branches set becomes the list
                of their values, in order. ``"concate_and_append"``: the texts that they
                appended are appended here, in order.
            return_exceptions: a failed branch does not fail the join; its error stands in
                the gathered lists.

        Raises:
            ProgramError: an unknown mode, or joined before.
            Exception: awaiting raises the first branch's error; the others are cancelled.
        """
        check_mode(mode)
        if self._joined is not None:
            raise ProgramError("these branches are joined already")
        parent = self._parent
        gathered = self._gathered() if mode == "gather_variable" else ()
        self._joined = done = Variable("join")
        children = tuple(state._branch for state in self._states)
        for state in self._states:
            state._closed = True
        for target, _ in gathered:
            assert target.name is not None
            parent._variables[target.name] = target
        if mode == "concate_and_append":
            parent._role = self._states[-1]._role
        point = JoinPoint(children, mode, return_exceptions, gathered, done)
        parent._door.call(parent._run.append, parent._branch, [point])
        return parent._door.read(done)

    def _gathered(self) -> tuple[tuple[Variable, tuple[Variable | None, ...]], ...]:
        """The variables that the branches set, each with what they set it to."""
        names: dict[str, None] = {}
        for state in self._states:
            for name, variable in state._variables.items():
                if self._before.get(name) is not variable:
                    names[name] = None
        return tuple(
            (Variable(name), tuple(state._variables.get(name) for state in self._states))
            for name in names
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc is None:
            if self._joined is None:
                await self.join()
        else:
            self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc is None:
            if self._joined is None:
                self.join()
        else:
            self._cancel()

    def _cancel(self) -> None:
        """The body failed: nobody will read what the branches make."""
        run = self._parent._run
        family = [b for state in self._states for b in state._branch.family()]
        self._parent._door.call(run.cancel, family)

    def __repr__(self) -> str:
        return f"<Branches {[state._branch.path for state in self._states]}>"
