"""How a program's body reaches its run: from a coroutine, or from a plain function.

A body that is a coroutine works on the event loop and awaits. A plain ``def`` body under the
async API works there, too, but cannot wait. (A third door, from a worker thread that may
block, belongs to :mod:`asyncsgl.sync`.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ParamSpec, Protocol

from ..errors import ProgramError
from .variable import Variable

__all__ = ["CoroutineDoor", "Door", "PlainDoor"]

P = ParamSpec("P")


class Door(Protocol):
    """The ways from a program's body to its run.

    What :meth:`read` and :meth:`ask` give depends on the kind of body (an awaitable, or the
    value itself), so it is typed ``Any``.
    """

    def call(self, function: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function`` on the event loop, in the order of the calls."""

    def read(self, variable: Variable) -> Any:
        """What reading a variable gives."""

    def ask(self, question: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """What waiting for an answer gives."""

    async def pause(self, enough: Callable[[], bool]) -> None:
        """Return when the body waits or has ended, or what it has appended is ``enough``."""

    async def run_body(
        self, body: Callable[..., Any], state: object, arguments: Mapping[str, object]
    ) -> object:
        """Run the program's function to its end and give what it returns."""


class CoroutineDoor:
    """For ``async def`` bodies: everything is on the loop already."""

    __slots__ = ()

    def call(self, function: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call it."""
        function(*args, **kwargs)

    def read(self, variable: Variable) -> Any:
        """The variable, to be awaited."""
        return variable

    def ask(self, question: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """A coroutine, to be awaited."""
        return question()

    async def pause(self, enough: Callable[[], bool]) -> None:
        """Return at once: whatever else runs on the loop runs while the body waits."""

    async def run_body(
        self, body: Callable[..., Any], state: object, arguments: Mapping[str, object]
    ) -> object:
        """Call the function, and await what it gives if that can be awaited."""
        result = body(state, **arguments)
        return await result if inspect.isawaitable(result) else result


class PlainDoor(CoroutineDoor):
    """For plain ``def`` bodies under the async API: they append, but cannot wait."""

    __slots__ = ()

    def read(self, variable: Variable) -> Any:
        """The variable: usable in appended text, and by value once it is known.

        Its value is known only for variables that no model has to write.
        """
        return variable.text if variable.done() else _Unreadable(variable)

    def ask(self, question: Callable[[], Coroutine[Any, Any, Any]]) -> Any:  # noqa: ARG002
        """Refuse.

        Raises:
            ProgramError: a plain function cannot wait.
        """
        raise _cannot_wait("this waits for the model")


class _Unreadable(Variable):
    """A pending variable in a plain function: it can be appended, not read."""

    __slots__ = ("_variable",)

    def __init__(self, variable: Variable) -> None:
        super().__init__(variable.name)
        self._variable = variable

    def __await__(self) -> Any:
        return self._variable.__await__()

    def done(self) -> bool:
        """Whether there is a value or an error."""
        return self._variable.done()

    @property
    def text(self) -> Any:
        """Refuse to be read. Raises ProgramError."""
        raise _cannot_wait(f"the variable {self.name!r} is not generated yet")

    def __eq__(self, other: object) -> bool:
        raise _cannot_wait(f"the variable {self.name!r} is not generated yet")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise _cannot_wait(f"the variable {self.name!r} is not generated yet")


def _cannot_wait(what: str) -> ProgramError:
    return ProgramError(
        f"{what}, and a plain `def` program cannot wait for it: write `async def` and await it, "
        "or run the program through asyncsgl.sync"
    )
