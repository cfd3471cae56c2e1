"""The words that programs are written in: ``gen``, ``select``, ``image``, roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from ..errors import InvalidArgument, ProgramError
from ..sampling import UNSET, Overrides, SamplingParams
from ..types import Role
from .choices import ChoicesMethod, token_length_normalized
from .constraint import constrain
from .expr import Concat, Expr, ExprLike, Gen, MediaNode, RoleBegin, RoleEnd, Select, flatten
from .media import MediaSource, load_image, load_video, name_of
from .reasoning import check_family

if TYPE_CHECKING:
    from .expr import Node

__all__ = [
    "assistant",
    "assistant_begin",
    "assistant_end",
    "gen",
    "gen_int",
    "gen_string",
    "image",
    "select",
    "separate_reasoning",
    "system",
    "system_begin",
    "system_end",
    "user",
    "user_begin",
    "user_end",
    "video",
]


def gen(
    name: str | None = None,
    limit: int | None = None,
    *,
    dtype: object = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    regex: str | None = None,
    json_schema: object = None,
    ebnf: str | None = None,
    **overrides: Unpack[Overrides],
) -> Gen | Select:
    """Generate text where this stands.

    Args:
        name: the variable that takes the text.
        limit: ``max_tokens``, by position.
        dtype: the type of the value: ``int``, ``float``, ``bool``, ``str`` (a quoted string),
            a ``Literal``, an ``Enum``, a dataclass or a pydantic model.
        choices: choose one of these texts; the same as :func:`select`.
        choices_method: the scoring rule of ``choices``.
        regex: a regular expression that the whole text matches.
        json_schema: a JSON schema (dict or text), or a class as for ``dtype``.
        ebnf: a grammar in Lark or GBNF notation.
        **overrides: sampling fields, see :class:`~asyncsgl.SamplingParams`.

    Raises:
        InvalidArgument: a value is out of its range, or two constraints are given.
    """
    if limit is not None:
        overrides = _limited(overrides, limit)
    if choices is not None:
        _only_choices(dtype, regex, json_schema, ebnf)
        unused = set(overrides) - {"temperature", "max_tokens", "max_new_tokens"}
        if unused:
            raise InvalidArgument("choices", f"cannot be combined with {', '.join(sorted(unused))}")
        return select(
            name,
            choices,
            temperature=overrides.get("temperature") or 0.0,
            choices_method=choices_method,
        )
    if choices_method is not None:
        raise InvalidArgument("choices_method", "has a meaning only with choices")
    _check_name(name)
    made = constrain(dtype=dtype, regex=regex, json_schema=json_schema, ebnf=ebnf)
    sampling = sampling_of(overrides)
    if made.stop:
        sampling = replace(sampling, stop=(*(sampling.stop or ()), *made.stop))
    return Gen(name, sampling, made.constraint, made.decode)


def _limited(overrides: Overrides, limit: int) -> Overrides:
    if overrides.get("max_tokens") is not None:
        raise InvalidArgument("max_tokens", "given by position and by name")
    return {**overrides, "max_tokens": limit}


def _only_choices(*others: object) -> None:
    if any(other is not None for other in others):
        raise InvalidArgument("choices", "cannot be combined with dtype, regex, schema or ebnf")


def _check_name(name: object) -> None:
    if name is not None and (not isinstance(name, str) or not name):
        raise InvalidArgument("name", f"must be a non-empty string, got {name!r}")


def sampling_of(overrides: Overrides) -> SamplingParams:
    """Make sampling parameters of keywords; ``max_new_tokens`` is ``max_tokens``.

    Raises:
        InvalidArgument: both names are given, or a value is out of its range.
    """
    fields = dict(overrides)
    if "max_new_tokens" in fields:
        if fields.get("max_tokens") is not None:
            raise InvalidArgument("max_new_tokens", "is max_tokens: give one of them")
        fields["max_tokens"] = fields.pop("max_new_tokens")
    if not fields:
        return UNSET
    try:
        return SamplingParams(**fields)  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidArgument("sampling", str(error).partition(") ")[2] or str(error)) from None


def gen_int(name: str | None = None, **overrides: Unpack[Overrides]) -> Gen | Select:
    """Generate a whole number; :func:`gen` with ``dtype=int``."""
    return gen(name, dtype=int, **overrides)


def gen_string(name: str | None = None, **overrides: Unpack[Overrides]) -> Gen | Select:
    """Generate a string in double quotes; :func:`gen` with ``dtype=str``."""
    return gen(name, dtype=str, **overrides)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod | None = None,
) -> Select:
    """Choose one of several texts by their probability here.

    Args:
        name: the variable that takes the chosen text.
        choices: at least one text, none empty, none twice.
        temperature: for backends that choose by generating; scoring needs none.
        choices_method: the scoring rule; ``token_length_normalized`` unless given.

    Raises:
        InvalidArgument: the choices are empty, repeated, or not texts.
    """
    _check_name(name)
    if choices is None or isinstance(choices, str) or not choices:
        raise InvalidArgument("choices", f"must be a list of at least one text, got {choices!r}")
    values: Sequence[object] = choices
    for choice in values:
        if not isinstance(choice, str) or not choice:
            raise InvalidArgument("choices", f"must be non-empty texts, got {choice!r}")
    if len(set(choices)) != len(choices):
        twice = sorted({choice for choice in choices if list(choices).count(choice) > 1})
        raise InvalidArgument("choices", f"given twice: {', '.join(map(repr, twice))}")
    SamplingParams(temperature=temperature)
    return Select(name, tuple(choices), choices_method or token_length_normalized, temperature)


def image(source: MediaSource, *, max_bytes: int | None = None) -> MediaNode:
    """An image of the prompt, kept in its place between texts.

    Args:
        source: a path, a URL, bytes, a PIL image, or a data URL.
        max_bytes: the largest file accepted; 20 MiB unless given.

    Raises:
        InvalidArgument: ``source`` is none of these; at the run, when it cannot be read.
    """
    return MediaNode("image", load_image(source, max_bytes), name_of(source))


def video(source: MediaSource, num_frames: int, *, max_bytes: int | None = None) -> MediaNode:
    """A video of the prompt, as frames sampled evenly.

    Args:
        source: a path, a URL, bytes, or a data URL.
        num_frames: how many frames to sample, 1 or more; -1 for all, at most 512.
        max_bytes: the largest file accepted; 200 MiB unless given.

    Raises:
        InvalidArgument: an argument is unusable; at the run, when the file cannot be read.
    """
    return MediaNode("video", load_video(source, num_frames, max_bytes), name_of(source))


def separate_reasoning(expr: ExprLike, model_type: str) -> Concat:
    """Split the reasoning off the generations in ``expr``.

    The variable ``x`` gets the answer and ``x_reasoning_content`` the reasoning.

    Args:
        expr: an expression with at least one :func:`gen`.
        model_type: the think-tag family: ``"deepseek-r1"``, ``"qwen3"``, ``"think"`` ….

    Raises:
        InvalidArgument: the family is unknown.
        ProgramError: there is no generation in ``expr``.
    """
    check_family(model_type)
    nodes = flatten(expr)
    if not any(isinstance(node, Gen) for node in nodes):
        raise ProgramError("separate_reasoning needs an expression with a gen in it")
    return Concat(tuple(_with_reasoning(node, model_type) for node in nodes))


def _with_reasoning(node: Node, model_type: str) -> Node:
    return replace(node, reasoning=model_type) if isinstance(node, Gen) else node


_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_BEGIN = {role: RoleBegin(role) for role in _ROLES}
_END = {role: RoleEnd(role) for role in _ROLES}


def _turn(role: Role, expr: ExprLike) -> Expr:
    return Concat((_BEGIN[role], *flatten(expr), _END[role]))


def system(expr: ExprLike) -> Expr:
    """A system turn with ``expr`` as its content."""
    return _turn("system", expr)


def user(expr: ExprLike) -> Expr:
    """A user turn with ``expr`` as its content."""
    return _turn("user", expr)


def assistant(expr: ExprLike) -> Expr:
    """An assistant turn with ``expr`` as its content."""
    return _turn("assistant", expr)


def system_begin() -> Expr:
    """Begin a system turn; :func:`system_end` ends it."""
    return RoleBegin("system")


def system_end() -> Expr:
    """End the system turn."""
    return RoleEnd("system")


def user_begin() -> Expr:
    """Begin a user turn; :func:`user_end` ends it."""
    return RoleBegin("user")


def user_end() -> Expr:
    """End the user turn."""
    return RoleEnd("user")


def assistant_begin() -> Expr:
    """Begin an assistant turn; :func:`assistant_end` ends it."""
    return RoleBegin("assistant")


def assistant_end() -> Expr:
    """End the assistant turn."""
    return RoleEnd("assistant")
