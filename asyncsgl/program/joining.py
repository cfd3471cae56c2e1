"""What a parent takes over from its children at a join."""

from __future__ import annotations

from ..errors import ProgramError
from ..types import Meta
from .branch import Branch, JoinPoint
from .variable import Variable

__all__ = ["JOIN_MODES", "check_mode", "merge_children"]

JOIN_MODES = ("gather_variable", "concate_and_append")


def merge_children(parent: Branch, join: JoinPoint) -> None:
    """Take over the children's variables or texts, by the join's mode."""
    if join.mode == "concate_and_append":
        for child in join.children:
            if child.failure is None:
                parent.take_over(child)
    for target, sources in join.gathered:
        texts = [_text_of(source) for source in sources]
        typed = [_typed_of(source) for source in sources]
        target.resolve(texts, typed, [_meta_of(source) for source in sources])
    join.done.resolve(None, None, None)


def _text_of(source: Variable | None) -> object:
    if source is None:
        return None
    return source.error if source.error is not None else source.text


def _typed_of(source: Variable | None) -> object:
    if source is None:
        return None
    return source.error if source.error is not None else source.typed


def _meta_of(source: Variable | None) -> Meta:
    if source is None or source.error is not None:
        return Meta(error=str(source.error) if source is not None else "not set in this branch")
    meta = source.meta
    return meta if isinstance(meta, Meta) else meta[0]


def check_mode(mode: str) -> None:
    """Refuse an unknown join mode.

    Raises:
        ProgramError: names the modes there are.
    """
    if mode not in JOIN_MODES:
        raise ProgramError(f"unknown join mode {mode!r}: use {' or '.join(JOIN_MODES)}")
