"""What one row came to, and the line of JSON that says so."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..types import Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .formats import JsonValue

__all__ = ["RowFailure", "RowResult", "StoredResult"]


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no answer.

    Args:
        type: the exception's class.
        message: what it said.
        line: the row's line in the input, from 1.
    """

    type: str
    message: str
    line: int


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row came to: one line of the output.

    Args:
        index: the row's position in the input, from 0.
        input: the row as it was read; ``None`` if it is no JSON object.
        variables: what the program generated and set; of a failed run, as far as it came.
        usage: the tokens that were counted.
        error: why it failed; ``None`` if it is answered.
        return_value: what the program returned, if anything.
    """

    index: int
    input: Mapping[str, JsonValue] | None
    variables: Mapping[str, JsonValue]
    usage: Usage
    error: RowFailure | None = None
    return_value: JsonValue = None

    def to_line(self, settings: Mapping[str, JsonValue]) -> bytes:
        """One line of JSON with its end.

        Raises:
            TypeError, ValueError: a variable or the return value is not JSON.
        """
        fields: dict[str, object] = {
            "index": self.index,
            "input": self.input,
            "variables": self.variables,
            "usage": asdict(self.usage),
            "error": None if self.error is None else asdict(self.error),
        }
        if self.return_value is not None:
            fields["return_value"] = self.return_value
        if settings:
            fields["settings"] = settings
        try:
            return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError:
            return json.dumps(fields, allow_nan=False).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class StoredResult:
    """What a line of the output tells to a run that resumes.

    Args:
        index: the row's position in the input.
        input: the row.
        failed: whether it has an error and not an answer.
        settings: what the answer depended on beside the row; ``None`` if it does not say.
    """

    index: int
    input: Mapping[str, JsonValue] | None
    failed: bool
    settings: Mapping[str, JsonValue] | None

    @classmethod
    def from_line(cls, raw: bytes) -> StoredResult | None:
        """Read a line; ``None`` if it is not the line of a result."""
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict) or not {"index", "input", "error"} <= fields.keys():
            return None
        index, settings = fields["index"], fields.get("settings")
        if type(index) is not int or index < 0 or not isinstance(settings, (dict, type(None))):
            return None
        return cls(index, fields["input"], fields["error"] is not None, settings)
