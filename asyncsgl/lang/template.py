"""Messages become text: named prefix/suffix templates and the models' own Jinja templates.

Two kinds: prefix and suffix for each role, and a model's own template in the Jinja language.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from ..errors import ProgramError
from ..types import Media, Message, Role

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = [
    "ChatTemplate",
    "JinjaTemplate",
    "NamedTemplate",
]


class ChatTemplate(Protocol):
    """Makes one text of messages."""

    @property
    def name(self) -> str:
        """What the template is called."""
        raise NotImplementedError

    def render(self, messages: Sequence[Message], *, continue_assistant: bool = False) -> str:
        """The messages as text.

        Args:
            messages: the prompt; raw text (role None) stands as it is.
            continue_assistant: the last message is the assistant's and stays open.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A template of a prefix and a suffix for each role.

    Args:
        name: what it is called.
        prefixes: text before a turn, by role.
        suffixes: text after a turn, by role.
        default_system: the system turn of a prompt that has none.
        system_inside_user: the first system turn stands inside the first user turn
            (the Llama 2 format).
        begin: text at the very beginning of a prompt.
        stop: strings that end a generation with this template.
        image_token: stands for an image.
        video_token: stands for a video.
    """

    name: str
    prefixes: Mapping[str, str] = field(default_factory=dict[str, str])
    suffixes: Mapping[str, str] = field(default_factory=dict[str, str])
    default_system: str | None = None
    system_inside_user: bool = False
    begin: str = ""
    stop: tuple[str, ...] = ()
    image_token: str = "<image>"
    video_token: str = "<video>"

    def prefix(self, role: Role) -> str:
        """The text before a turn of ``role``."""
        return self.prefixes.get(role, "")

    def suffix(self, role: Role) -> str:
        """The text after a turn of ``role``."""
        return self.suffixes.get(role, "")

    def render(self, messages: Sequence[Message], *, continue_assistant: bool = False) -> str:
        """The messages as text; see :meth:`ChatTemplate.render`."""
        pieces = [self.begin] if any(message.role for message in messages) else []
        turns = self._with_default_system(messages)
        last = len(turns) - 1
        for index, message in enumerate(turns):
            content = self._content(message)
            if message.role is None:
                pieces.append(content)
                continue
            first_user = index == 1 and turns[0].role == "system" and self.system_inside_user
            pieces.append(
                "" if first_user and message.role == "user" else self.prefix(message.role)
            )
            pieces.append(content)
            if not (continue_assistant and index == last):
                pieces.append(self.suffix(message.role))
        return "".join(pieces)

    def _with_default_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.default_system is None or not messages or messages[0].role in (None, "system"):
            return messages
        return (Message("system", (self.default_system,)), *messages)

    def _content(self, message: Message) -> str:
        return "".join(
            part if isinstance(part, str) else self._token(part) for part in message.parts
        )

    def _token(self, media: Media) -> str:
        return self.image_token if media.kind == "image" else self.video_token


_MARK = "\ue000asyncsgl-open\ue001"
"""Put at the end of an open turn, with a space, to find it again in the rendered text. Where
the space is gone the template strips turns, and a stripped turn is what the model knows."""


_PROBE = "a probing word"


@dataclass(frozen=True, slots=True)
class JinjaTemplate:
    """A model's own template in the Jinja language, rendered in a sandbox.

    Args:
        source: the template, as it stands in the model's tokenizer configuration.
        special_tokens: ``bos_token`` and the like, by name.
        name: what it is called.
        arguments: more variables for the template, such as ``{"enable_thinking": False}``.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    name: str = "model"
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])

    def render(self, messages: Sequence[Message], *, continue_assistant: bool = False) -> str:
        """The messages as text; see :meth:`ChatTemplate.render`.

        Raises:
            ProgramError: the template refuses the messages.
        """
        pieces: list[str] = []
        start = 0
        for index, message in enumerate(messages):
            if message.role is None:
                pieces += [self._turns(messages[start:index], open_last=False), self._raw(message)]
                start = index + 1
        pieces.append(self._turns(messages[start:], open_last=continue_assistant))
        return "".join(pieces)

    def _raw(self, message: Message) -> str:
        """Text outside of turns, which no template sees."""
        token = self.special_tokens.get("image_token", "<image>")
        return "".join(part if isinstance(part, str) else token for part in message.parts)

    def _turns(self, messages: Sequence[Message], *, open_last: bool) -> str:
        if not messages:
            return ""
        listed = _wants_parts(self.source)
        if not open_last:
            return self._jinja([_as_dict(message, listed) for message in messages])
        *before, last = messages
        turns = [_as_dict(message, listed) for message in before]
        if not any(last.parts):
            return self._jinja(turns, add_generation_prompt=True)
        turns.append(_as_dict(Message("assistant", (*last.parts, f"{_MARK} ")), listed))
        text, mark, rest = self._jinja(turns).rpartition(_MARK)
        if not mark or not _shows(text, last):
            raise ProgramError(
                f"the chat template {self.name!r} does not show an assistant turn as it is, so it "
                "cannot be continued: begin the assistant turn with the gen, and split reasoning "
                "off by separate_reasoning"
            )
        return text if rest.startswith(" ") else text.rstrip()

    def _jinja(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        # Besides what a template says itself, wrong kinds of content fail as in any Python.
        faults = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
        variables = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **self.arguments,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _compiled(self.source).render(variables)
        except faults as error:
            raise ProgramError(
                f"the chat template {self.name!r} refuses these messages: {error}"
            ) from error


def _shows(text: str, turn: Message) -> bool:
    """Whether ``text`` ends with what ``turn`` says last, white space aside."""
    said = "".join(part if isinstance(part, str) else "\0" for part in turn.parts)
    tail = said.rpartition("\0")[2].strip()
    return text.rstrip().endswith(tail) or _squeezed(text).endswith(_squeezed(tail))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _as_dict(message: Message, listed: bool) -> dict[str, object]:
    """A message as templates know it: a text, or a list of parts when there is media.

    Args:
        message: a turn.
        listed: the template wants a list of every turn.
    """
    if not listed and all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": message.text}
    content: list[dict[str, str]] = []
    for kind, parts in groupby(message.parts, lambda part: isinstance(part, str)):
        if kind:  # one part, as templates put something between two
            content.append({"type": "text", "text": "".join(map(str, parts))})
        else:
            content += [{"type": part.kind} for part in parts if isinstance(part, Media)]
    return {"role": message.role, "content": content}


@functools.lru_cache(maxsize=32)
def _wants_parts(source: str) -> bool:
    """Whether a template shows a turn's text only where it comes in a list of parts.

    Templates of models that read images often go through a turn's parts, and show nothing of a
    turn that is a text.
    """

    def shows(content: object) -> bool:
        turn = {"role": "user", "content": content}
        try:
            return _PROBE in _compiled(source).render(messages=[turn], bos_token="", eos_token="")
        except Exception:  # noqa: BLE001 - whatever it fails with, it does not show it
            return False

    return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """``{% generation %}`` marks for training what a model writes; here it shows it."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment.from_string(source)
