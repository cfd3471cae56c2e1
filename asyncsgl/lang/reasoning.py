"""Splits a model's reasoning from its answer by think tags, also while it streams."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import InvalidArgument

__all__ = ["ReasoningFamily", "ReasoningSplitter", "check_family", "reasoning_variable"]


@dataclass(frozen=True, slots=True)
class ReasoningFamily:
    """How a family of models marks its reasoning.

    Args:
        begin: the tag that opens the reasoning.
        end: the tag that closes it.
        starts_open: the chat template already wrote ``begin``, so that the text may begin
            within the reasoning.
    """

    begin: str
    end: str
    starts_open: bool


_THINK = ReasoningFamily("<think>", "</think>", starts_open=False)
_OPEN_THINK = ReasoningFamily("<think>", "</think>", starts_open=True)
_KIMI = ReasoningFamily("◁think▷", "◁/think▷", starts_open=False)
FAMILIES = {
    "deepseek-r1": _OPEN_THINK,
    "deepseek-v3": _THINK,
    "glm45": _THINK,
    "kimi": _KIMI,
    "qwen3": _THINK,
    "qwen3-thinking": _OPEN_THINK,
    "think": _THINK,
}


def check_family(name: object) -> ReasoningFamily:
    """The family called ``name``.

    Raises:
        InvalidArgument: there is none; names the near ones.
    """
    family = FAMILIES.get(name.lower()) if isinstance(name, str) else None
    if family is None:
        near = get_close_matches(str(name), FAMILIES, n=3) or sorted(FAMILIES)
        raise InvalidArgument("model_type", f"unknown {name!r}; there is {', '.join(near)}")
    return family


def reasoning_variable(name: str) -> str:
    """The variable that takes the reasoning split off from ``name``."""
    return f"{name}_reasoning_content"


class ReasoningSplitter:
    """Splits a growing text into reasoning and answer.

    Whatever the pieces that the text comes in, the joined results are the same. A family
    that starts open and never closes its reasoning has reasoning only. White space around
    the tags belongs to neither part.
    """

    def __init__(self, family: ReasoningFamily) -> None:
        self._family = family
        self._held = ""
        self._inside: bool | None = None
        self._trim = False

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece and give (new reasoning, new answer)."""
        self._held += text
        reasoning = ""
        while True:
            if self._inside is None:
                if not self._decide_start(final=False):
                    return reasoning, ""
            elif self._inside:
                self._trim_start()
                piece, closed = self._until_tag(self._family.end)
                reasoning += piece
                if not closed:
                    return reasoning, ""
                self._inside, self._trim = False, True
            else:
                self._trim_start()
                answer, self._held = self._held, ""
                return reasoning, answer

    def flush(self) -> tuple[str, str]:
        """The text has ended: give what was held back."""
        if self._inside is None:
            self._decide_start(final=True)
        self._trim_start()
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._inside else ("", held)

    def _decide_start(self, *, final: bool) -> bool:
        """Find out whether the text begins with reasoning; False while it is too short."""
        begin = self._family.begin
        stripped = self._held.lstrip()
        if stripped.startswith(begin):
            self._held = stripped[len(begin) :]
            self._inside = self._trim = True
            return True
        if begin.startswith(stripped) and not final:
            return False
        self._inside = self._trim = self._family.starts_open
        return True

    def _until_tag(self, tag: str) -> tuple[str, bool]:
        """What stands before ``tag``, and whether the tag was there.

        Holds back what may be the tag's beginning and white space that may stand before it.
        """
        before, found, after = self._held.partition(tag)
        if found:
            self._held = after
            return before.rstrip(), True
        keep = next((size for size in range(len(tag) - 1, 0, -1) if before.endswith(tag[:size])), 0)
        ready = before[: len(before) - keep].rstrip()
        self._held = before[len(ready) :]
        return ready, False

    def _trim_start(self) -> None:
        """Drop the white space after a tag."""
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
