"""Writes the table of what each backend can do into the documentation.

``python -m tools.capability_table`` writes it, ``--check`` says whether it is current. The table is made of what the backends declare (:class:`asyncsgl.backends.base.Capabilities`). A
backend whose library is not installed keeps the column that the page has.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import asyncsgl
from asyncsgl.backends.base import FEATURES, Backend
from asyncsgl.errors import MissingDependency
from asyncsgl.sampling import SAMPLING_FIELDS

PAGE = Path(__file__).parent.parent / "docs" / "capabilities.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

ELEMENTS = {
    "raw_text": "text outside of roles",
    "chat": "`system`, `user`, `assistant`",
    "continue_assistant": "text in a turn before its `gen`",
    "select": "`select`, `gen(choices=)`",
    "regex": "`gen(regex=)`, `dtype` of `int`, `float`, `bool`, `str`, `Literal`, `Enum`",
    "json_schema": "`gen(json_schema=)`, `dtype` of a model or dataclass",
    "ebnf": "`gen(ebnf=)`",
    "image": "`image`",
    "video": "`video`",
    "reasoning": "`separate_reasoning`",
    **{name: f"`{name}`" for name in SAMPLING_FIELDS},
}
KEY = "no-key"
BACKENDS: dict[str, Callable[[], Backend]] = {
    "Runtime": asyncsgl.Runtime,
    "RuntimeEndpoint": lambda: asyncsgl.RuntimeEndpoint("http://localhost:30000"),
    "OpenAI: gpt-4o": lambda: asyncsgl.OpenAI("gpt-4o", api_key=KEY),
    "OpenAI: gpt-5.5": lambda: asyncsgl.OpenAI("gpt-5.5", api_key=KEY),
    "OpenAI: davinci-002": lambda: asyncsgl.OpenAI("davinci-002", api_key=KEY),
    "Anthropic: claude-haiku-4-5": lambda: asyncsgl.Anthropic("claude-haiku-4-5", api_key=KEY),
    "Anthropic: claude-sonnet-5": lambda: asyncsgl.Anthropic("claude-sonnet-5", api_key=KEY),
    "VertexAI: gemini-3.5-flash": lambda: asyncsgl.VertexAI("gemini-3.5-flash", api_key=KEY),
    "LiteLLM": lambda: asyncsgl.LiteLLM("openai/gpt-4o", api_key=KEY),
}


def column(name: str, page: str) -> dict[str, str]:
    """What one backend declares, by feature; what the page says where it cannot be made here."""
    try:
        can = BACKENDS[name]().capabilities
    except MissingDependency:
        return written(page)[name]
    return {feature: can.support(feature) for feature in FEATURES}


def written(page: str) -> dict[str, dict[str, str]]:
    """The columns that the page has."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    labels = {label: feature for feature, label in ELEMENTS.items()}
    names = rows[0][1:]
    return {
        name: {labels[row[0]]: row[index] for row in rows[2:]}
        for index, name in enumerate(names, 1)
    }


def table(page: str) -> str:
    """The table as Markdown."""
    columns = {name: column(name, page) for name in BACKENDS}
    lines = [["element", *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [ELEMENTS[feature], *(cells[feature] for cells in columns.values())] for feature in FEATURES
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def current(page: str) -> str:
    """The page with the table as it has to be."""
    made = f"{BEGIN}{table(page)}{END}"
    return re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: made, page, flags=re.DOTALL)


def main() -> int:
    """Write the page anew; 1 with ``--check`` if that would change it."""
    before = PAGE.read_text(encoding="utf-8")
    after = current(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
