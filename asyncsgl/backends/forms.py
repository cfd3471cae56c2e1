"""What the text of an answer must look like where the provider cannot enforce all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import MissingDependency
from ..types import Constraint, Message
from .schemas import KEY, Dialect, narrowed, wrapped

__all__ = ["Form", "form_of"]

_PLAIN_TYPES: dict[str, str] = {
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "str": "string",
}
_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Form:
    """How one answer is asked for, read and checked.

    Args:
        schema: sent to the provider, which enforces it; None if it cannot.
        in_object: the answer stands in the property ``value`` of the object.
        as_text: the property's value becomes the answer's text, not JSON.
        pattern: the whole text must match it.
        check: a JSON schema that the text must fit.
        label: how messages call what is wanted.
        emulated: how it was emulated, in words; empty where it is native.
    """

    schema: Mapping[str, object] | None = None
    in_object: bool = False
    as_text: bool = False
    pattern: str | None = None
    check: str | None = None
    label: str = ""
    emulated: str = ""

    @property
    def as_it_comes(self) -> bool:
        """Whether the provider's text is the answer's, with nothing to check."""
        return not self.in_object and self.pattern is None and self.check is None

    def read(self, text: str) -> str:
        """The answer's text.

        Raises:
            ValueError: it has not the form; says why, for the model to read.
        """
        if self.in_object:
            text = self._inside(text)
        elif self.check is not None:
            text = _unfenced(text)
        if self.pattern is not None:
            return self._matching(text)
        if self.check is not None:
            _validate(text, self.check)
        return text

    def instruction(self) -> str:
        """What to tell the model beforehand where the provider enforces nothing."""
        if self.pattern is not None:
            return f"Answer with {self._wanted()} and nothing else."
        return f"Answer with JSON that fits this schema and nothing else: {self.check}"

    def correction(self, bad: str, reason: str) -> tuple[Message, Message]:
        """The turns that tell the model what failed."""
        said = (
            f"That answer cannot be used: {reason}. Answer again, with {self._named()} and nothing else: "
            "no explanation and no quotation marks around it."
        )
        return Message("assistant", (bad or "(nothing)",)), Message("user", (said,))

    def preface(self, reason: str) -> str:
        """The same for a model that takes one text: what goes ahead of it."""
        return (
            f"(The text below must go on with {self._named()} and nothing else. "
            f"What was written there last cannot be used: {reason}.)\n\n"
        )

    def _named(self) -> str:
        return self._wanted() if self.pattern is not None else f"JSON for {self.check}"

    def _wanted(self) -> str:
        if self.label.startswith("one of "):
            return self.label
        name = f"{self.label}, " if self.label else ""
        return f"{name}text that matches the regular expression {self.pattern}"

    def _inside(self, text: str) -> str:
        value = _json(text)
        if not isinstance(value, dict) or KEY not in value:
            raise ValueError(f"it is no object with the key {KEY!r}")
        inner = value[KEY]
        if not self.as_text:
            return json.dumps(inner, ensure_ascii=False)
        return inner if isinstance(inner, str) else repr(inner)

    def _matching(self, text: str) -> str:
        assert self.pattern is not None
        for candidate in (text, text.strip()):
            if re.fullmatch(self.pattern, candidate):
                return candidate
        raise ValueError(f"{_short(text)} does not match {self.pattern}")


def form_of(
    constraint: Constraint, dialect: Dialect | None, *, structured: bool, open_turn: bool
) -> Form:
    """How to get an answer that keeps ``constraint``.

    Args:
        constraint: a regular expression or a JSON schema.
        dialect: of the schemas that the provider enforces.
        structured: the provider enforces schemas.
        open_turn: the answer continues a turn, which an object cannot.

    Raises:
        MissingDependency: the answer must be checked against a schema, and jsonschema is missing.
    """
    native = structured and dialect is not None and not open_turn
    if constraint.kind == "regex":
        plain = _PLAIN_TYPES.get(constraint.label)
        if native and plain is not None:
            return Form(
                wrapped({"type": plain}),
                in_object=True,
                as_text=constraint.label != "str",
                pattern=constraint.source,
                label=constraint.label,
                emulated=f"{constraint.label}: by a JSON schema",
            )
        return Form(
            pattern=constraint.source,
            label=constraint.label,
            emulated="regex: checked, and asked again where it does not match",
        )
    schema = json.loads(constraint.source)
    narrow = narrowed(schema, dialect) if native and dialect is not None else None
    if narrow is None:
        _needs_jsonschema()
        how = "json_schema: checked, and asked again where it does not fit"
        return Form(check=constraint.source, label=constraint.label, emulated=how)
    if not narrow.exact:
        _needs_jsonschema()
    return Form(
        narrow.schema,
        narrow.in_object,
        check=None if narrow.exact else constraint.source,
        label=constraint.label,
        emulated="" if narrow.exact else "json_schema: in part, the rest checked",
    )


def _needs_jsonschema() -> None:
    try:
        import jsonschema  # noqa: F401 - needed when the answer comes
    except ImportError as error:
        raise MissingDependency("jsonschema", "openai") from error


def _json(text: str) -> object:
    try:
        value: object = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{_short(text)} is not JSON: {error}") from error
    return value


def _validate(text: str, source: str) -> None:
    import jsonschema

    value = _json(text)
    try:
        jsonschema.validate(value, json.loads(source))
    except jsonschema.ValidationError as error:
        raise ValueError(
            f"it does not fit the schema at {error.json_path}: {error.message}"
        ) from error


def _unfenced(text: str) -> str:
    """The text inside a fence of Markdown, which models like to put around JSON."""
    found = _FENCED.match(text)
    return found[1] if found else text.strip()


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:197] + "...")
