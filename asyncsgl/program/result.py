"""The finished state of a run: plain data, to be read, pickled and written as JSON."""

from __future__ import annotations

import base64
import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ProgramError, UnknownVariable
from ..lang.template import ChatTemplate
from ..types import Media, Message, Meta, Part, Usage
from .variable import Variable

__all__ = ["State"]


class State:
    """What a run made. ``state["x"]`` is the variable's text.

    A variable is a list where ``n > 1`` answers were asked for or branches were gathered.

    Attributes:
        return_value: what the program's function returned.
        usage: tokens of all calls of the run.
        run_id: the run's id.
    """

    __slots__ = ("_messages", "_template", "_variables", "return_value", "run_id", "usage")

    def __init__(
        self,
        variables: Mapping[str, tuple[Any, Any, Meta | list[Meta]]],
        messages: Sequence[Message],
        template: ChatTemplate,
        usage: Usage,
        return_value: Any = None,
        run_id: str = "",
    ) -> None:
        self._variables = dict(variables)
        self._messages = tuple(messages)
        self._template = template
        self.usage = usage
        self.return_value = return_value
        self.run_id = run_id

    def __getitem__(self, name: str) -> Any:
        """The text of a variable.

        Raises:
            UnknownVariable: the run did not set it.
        """
        return self._entry(name)[0]

    def _entry(self, name: str) -> tuple[Any, Any, Meta | list[Meta]]:
        entry = self._variables.get(name)
        if entry is None:
            raise UnknownVariable(name, self._variables)
        return entry

    def get(self, name: str, default: Any = None) -> Any:
        """The text of a variable, or ``default`` if the run did not set it."""
        entry = self._variables.get(name)
        return default if entry is None else entry[0]

    def __contains__(self, name: object) -> bool:
        return name in self._variables

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    @property
    def variables(self) -> dict[str, Any]:
        """All variables with their texts."""
        return {name: text for name, (text, _, _) in self._variables.items()}

    def value(self, name: str) -> Any:
        """The typed value of a variable: an int, a model … as the program asked.

        Raises:
            UnknownVariable: the run did not set it.
            OutputError: the text has no value of its type.
        """
        value = self._entry(name)[1]
        if isinstance(value, Exception):
            raise value
        return value

    def meta(self, name: str) -> Any:
        """How a variable came about: :class:`~asyncsgl.Meta`, or a list of them.

        Raises:
            UnknownVariable: the run did not set it.
        """
        return self._entry(name)[2]

    def text(self) -> str:
        """Everything that the run wrote, as the chat template writes it."""
        return self._template.render(self._messages)

    def messages(self) -> list[dict[str, Any]]:
        """The turns, as ``{"role": …, "content": …}``.

        The content is a text, or a list of parts where there are images or videos. Text
        outside of any role is in :meth:`text` only.
        """
        return turns(self._messages)

    def to_dict(self) -> dict[str, Any]:
        """The state as values that JSON has.

        A return value or a variable that JSON has no form for is given by its ``repr``.
        """
        return {
            "run_id": self.run_id,
            "variables": to_json_value(self.variables),
            "messages": self.messages(),
            "return_value": to_json_value(self.return_value),
            "usage": {**dataclasses.asdict(self.usage), "total_tokens": self.usage.total_tokens},
            "meta": {name: to_json_value(meta) for name, (_, _, meta) in self._variables.items()},
        }

    # -- names of SGLang's frontend ------------------------------------------------------

    def get_var(self, name: str) -> Any:
        """The same as ``state[name]``."""
        return self[name]

    def set_var(self, name: str, value: Any) -> None:
        """Set a variable of the finished state."""
        self._variables[name] = (value, value, Meta())

    def get_meta_info(self, name: str) -> Any:
        """The same as :meth:`meta`."""
        return self.meta(name)

    def error(self) -> None:
        """None: a run that failed raises its error and gives no finished state."""
        return

    def sync(self) -> None:
        """Nothing: a finished state has nothing left to wait for."""

    @property
    def ret_value(self) -> Any:
        """The same as :attr:`return_value`."""
        return self.return_value

    def __repr__(self) -> str:
        return f"<State variables={list(self._variables)} usage={self.usage}>"


def collect(variables: Mapping[str, Variable]) -> dict[str, tuple[Any, Any, Meta | list[Meta]]]:
    """The entries of the variables that have a value."""
    return {
        name: (variable.text, variable.typed, variable.meta)
        for name, variable in variables.items()
        if variable.done() and variable.error is None
    }


def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages that have a role, as ``{"role": …, "content": …}``."""
    return [
        {"role": message.role, "content": _content(message)}
        for message in messages
        if message.role is not None
    ]


def _content(message: Message) -> str | list[dict[str, Any]]:
    if all(isinstance(part, str) for part in message.parts):
        return message.text
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, str) and content and content[-1]["type"] == "text":
            content[-1]["text"] += part
        else:
            content.append(_part(part))
    return content


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part.kind == "image":
        return {"type": "image_url", "image_url": {"url": _url(part)}}
    return {"type": "video", "name": part.name, "frames": len(part.frames)}


def _url(media: Media) -> str:
    if media.url is not None:
        return media.url
    if media.data is None:
        raise ProgramError(f"{media.name} has neither data nor an address")
    return f"data:{media.media_type};base64,{base64.b64encode(media.data).decode()}"


def to_json_value(value: Any) -> Any:
    """``value`` in the types that JSON has; by its ``repr`` where there is no other way."""
    match value:
        case enum.Enum():
            return to_json_value(value.value)
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): to_json_value(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [to_json_value(item) for item in value]
        case BaseException():
            return {"error": type(value).__name__, "message": str(value)}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return {field.name: to_json_value(getattr(value, field.name)) for field in fields}
        case _ if hasattr(value, "model_dump"):
            return value.model_dump(mode="json")
        case _:
            return repr(value)
