"""Chat templates by name."""

from __future__ import annotations

from difflib import get_close_matches

from ..errors import InvalidArgument
from .named_templates import TEMPLATES
from .template import ChatTemplate, JinjaTemplate, NamedTemplate

__all__ = [
    "ChatTemplate",
    "JinjaTemplate",
    "NamedTemplate",
    "get_chat_template",
    "register_chat_template",
]

_registered: dict[str, NamedTemplate] = {}


def get_chat_template(name: str) -> NamedTemplate:
    """The named template ``name``.

    Raises:
        InvalidArgument: there is none of this name; tells the near ones.
    """
    template = _registered.get(name) or TEMPLATES.get(name)
    if template is None:
        known = sorted({*TEMPLATES, *_registered})
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        listed = f"did you mean {', '.join(near)}?" if near else f"there is {', '.join(known)}"
        raise InvalidArgument("chat_template", f"unknown {name!r}: {listed}")
    return template


def register_chat_template(template: NamedTemplate) -> None:
    """Make ``template`` known to :func:`get_chat_template` by its name, in this process."""
    _registered[template.name] = template
