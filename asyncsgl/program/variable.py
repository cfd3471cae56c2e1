"""A variable of a running program: a value that is there now or later."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from ..errors import ProgramError
from ..lang.expr import Concat, ExprLike, Ref, flatten
from ..types import Meta

__all__ = ["Variable"]


class Variable:
    """What ``s["x"]`` gives in a program: await it for exactly this value.

    It may also be used inside text that is appended: ``s += "About " + s["x"]`` puts the
    value there when it is known. ``str()`` and f-strings need it to be known already.
    """

    __slots__ = ("_done", "_error", "_meta", "_name", "_text", "_typed", "_waiters")

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._done = False
        self._error: Exception | None = None
        self._text: Any = None
        self._typed: Any = None
        self._meta: Meta | list[Meta] | None = None
        self._waiters: list[asyncio.Future[None]] | None = None

    @property
    def name(self) -> str | None:
        """The variable's name; None for a generation without one."""
        return self._name

    def done(self) -> bool:
        """Whether there is a value or an error."""
        return self._done

    @property
    def error(self) -> Exception | None:
        """Why there will be no value."""
        return self._error

    @property
    def text(self) -> Any:
        """The text, or a list of texts.

        Raises:
            ProgramError: it is not known yet.
            Exception: the error that kept it from being generated.
        """
        self._require()
        return self._text

    @property
    def typed(self) -> Any:
        """The value by its type; the text where it has none. Raises as :attr:`text`."""
        self._require()
        return self._typed

    @property
    def meta(self) -> Meta | list[Meta]:
        """How it came about. Raises as :attr:`text`."""
        self._require()
        return self._meta or Meta()

    def _require(self) -> None:
        if not self._done:
            raise ProgramError(
                f"the variable {self._name!r} is not generated yet: await it first "
                f"(`await s[{self._name!r}]`)"
            )
        if self._error is not None:
            raise self._error

    def resolve(self, text: Any, typed: Any, meta: Meta | list[Meta] | None) -> None:
        """Set the value and wake whoever waits."""
        self._text, self._typed, self._meta = text, typed, meta
        self._finish()

    def fail(self, error: Exception) -> None:
        """Say that there will be no value; no effect once there is one."""
        if not self._done:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self._done = True
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Return when there is a value or an error."""
        if self._done:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        await waiter

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self.wait().__await__()
        return self.text

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a variable of a running program has no {name!r}: await it for its text "
            f"(`await s[{self._name!r}]`)"
        )

    def __eq__(self, other: object) -> bool:
        """Compare the text, which must be known. Raises ProgramError if it is not."""
        return self is other or bool(self.text == other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        """Whether there is some text, which must be known. Raises ProgramError if it is not."""
        return bool(self.text)

    def __str__(self) -> str:
        return str(self.text)

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)

    def __repr__(self) -> str:
        state = "pending" if not self._done else "failed" if self._error else repr(self._text)
        return f"<Variable {self._name!r}: {state}>"

    def __add__(self, other: ExprLike) -> Concat:
        return Concat((Ref(self), *flatten(other)))

    def __radd__(self, other: ExprLike) -> Concat:
        return Concat((*flatten(other), Ref(self)))
