"""The README and the documentation keep their word: their Python runs, their files exist."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

import asyncsgl
from asyncsgl.testing import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# A comment on the line before a block says how it runs: on the default model, with a script
# of answers in JSON, or not at all and why.
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>model|answers|not run): ?(?P<detail>[^\n]*?) -->\n)?"
    r"^```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; ``line`` is where its code begins, from 1."""

    page: Path
    line: int
    kind: str
    mark: str
    detail: str
    code: str

    def run(self, module: ModuleType) -> None:
        """Run the code in ``module``; a block that awaits gets an event loop of its own."""
        code = compile(
            "\n" * (self.line - 1) + self.code,
            str(self.page),
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
        if self.mark == "not run":
            return
        answers = json.loads(self.detail) if self.mark == "answers" else "Paris."
        asyncsgl.set_default_backend(ScriptedBackend(answers, chunk_size=3))
        result = eval(code, vars(module))
        if inspect.iscoroutine(result):
            asyncio.run(result)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start("code")) + 1,
            match["kind"],
            match["mark"] or "",
            match["detail"] or "",
            match["code"],
        )
        for match in BLOCK.finditer(text)
    ]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An empty module for the code of one page."""
    made = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", made)
    yield made
    asyncsgl.set_default_backend(None)


@pytest.mark.timeout(300)  # some blocks load the default model
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page: Path, module: ModuleType) -> None:
    python = [block for block in blocks(page) if block.kind == "python"]
    for block in python:
        block.run(module)
    assert "```python" not in re.sub(BLOCK, "", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_includes_is_there(page: Path) -> None:
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("--8")]
    files = [re.fullmatch(r'--8<-- "(.+)"', line) for line in lines]
    assert None not in files, lines
    assert [file[1] for file in files if file and not (ROOT / file[1]).is_file()] == []


def test_a_block_that_is_left_out_says_why() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.mark == "not run"]
    assert [block for block in left_out if len(block.detail) < 10] == []


def test_continuous_integration_runs_the_commands_of_the_readme() -> None:
    commands = [block.code.strip() for block in blocks(README) if block.kind == "bash"]
    steps = re.findall(r'^step "(.+)"$', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert steps == [commands[-1], commands[0]]
