"""The nodes of a program: what ``s += …`` takes and the interpreter executes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, runtime_checkable

from ..errors import ProgramError
from ..types import Constraint, Media, Role, SamplingParams

if TYPE_CHECKING:
    from .choices import ChoicesMethod

__all__ = [
    "Concat",
    "Expr",
    "ExprLike",
    "Gen",
    "MediaNode",
    "Node",
    "Ref",
    "RoleBegin",
    "RoleEnd",
    "ScopeBegin",
    "ScopeEnd",
    "Select",
    "TextNode",
    "TextSource",
    "flatten",
]


@runtime_checkable
class TextSource(Protocol):
    """A value that becomes text later: a variable that is not generated yet."""

    @property
    def name(self) -> str | None:
        """The variable's name."""

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the text."""
        raise NotImplementedError


class Expr:
    """Base of all expressions; they are joined by ``+`` with each other and with text."""

    __slots__ = ()

    def __add__(self, other: ExprLike) -> Concat:
        return Concat((*_parts(self), *_parts(other)))

    def __radd__(self, other: ExprLike) -> Concat:
        return Concat((*_parts(other), *_parts(self)))


ExprLike: TypeAlias = "Expr | str | TextSource | Sequence[ExprLike]"


@dataclass(frozen=True, slots=True)
class TextNode(Expr):
    """Constant text."""

    text: str


@dataclass(frozen=True, slots=True)
class Ref(Expr):
    """The text of a variable, used where it stands."""

    source: TextSource


@dataclass(frozen=True, slots=True)
class Gen(Expr):
    """One generation.

    Args:
        name: the variable that takes the text; None for text that is only appended.
        sampling: the fields that this generation sets itself.
        constraint: what the text must look like.
        decode: makes the typed value of the text; raises ValueError where it cannot.
        reasoning: the think-tag family to split off, such as ``"qwen3"``.
    """

    name: str | None
    sampling: SamplingParams
    constraint: Constraint | None = None
    decode: Callable[[str], object] | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Select(Expr):
    """One choice among texts."""

    name: str | None
    choices: tuple[str, ...]
    method: ChoicesMethod
    temperature: float = 0.0
    decode: Callable[[str], object] | None = None


@dataclass(frozen=True, slots=True)
class MediaNode(Expr):
    """An image or video; ``load`` reads and checks it, off the event loop."""

    kind: str
    load: Callable[[], Awaitable[Media]]
    name: str


@dataclass(frozen=True, slots=True)
class RoleBegin(Expr):
    """A turn of ``role`` begins."""

    role: Role


@dataclass(frozen=True, slots=True)
class RoleEnd(Expr):
    """The turn of ``role`` ends."""

    role: Role


@dataclass(frozen=True, slots=True)
class ScopeBegin(Expr):
    """From here on the text belongs to the variable ``name``, too."""

    name: str


@dataclass(frozen=True, slots=True)
class ScopeEnd(Expr):
    """The scope ``name`` ends and its variable is set."""

    name: str


@dataclass(frozen=True, slots=True)
class Concat(Expr):
    """Expressions one after the other."""

    nodes: tuple[Node, ...]


Node = TextNode | Ref | Gen | Select | MediaNode | RoleBegin | RoleEnd | ScopeBegin | ScopeEnd


def _parts(value: object) -> tuple[Node, ...]:
    if isinstance(value, str):
        return (TextNode(value),) if value else ()
    if isinstance(value, Concat):
        return value.nodes
    if isinstance(value, Expr):
        return (cast("Node", value),)
    if isinstance(value, TextSource):
        return (Ref(value),)
    if isinstance(value, (list, tuple)):
        return tuple(node for part in value for node in _parts(part))
    raise ProgramError(
        f"cannot append {type(value).__name__} to a program: use text, gen, select, image, "
        "a role such as user(...), or several joined by +"
    )


def flatten(value: object) -> tuple[Node, ...]:
    """The nodes of what a user appended: text, an expression, a variable, a list of these.

    Raises:
        ProgramError: it is none of them.
    """
    return _parts(value)
