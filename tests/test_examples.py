"""Each example runs as it is, without a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asyncsgl.testing import ScriptedBackend

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_hello(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ScriptedBackend({"greets Ada": "Hello, Ada!"})
    assert (await example("hello").main(backend))["greeting"] == "Hello, Ada!"
    assert capsys.readouterr().out.startswith("Hello, Ada!\n")


async def test_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ScriptedBackend("Once upon a time.", chunk_size=3)
    assert (await example("streaming").main(backend))["story"] == "Once upon a time."
    assert capsys.readouterr().out == "Once upon a time.\n"


async def test_multi_turn(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ScriptedBackend(["Tokyo.", "Its towers."])
    state = await example("multi_turn").main(backend)
    assert state.return_value == "Tokyo. Its towers."
    assert capsys.readouterr().out.splitlines()[1:] == [
        "     user: What is the capital of Japan?",
        "assistant: Tokyo.",
        "     user: What is this city known for?",
        "assistant: Its towers.",
    ]


async def test_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ScriptedBackend({"Peru": "Lima.", "capital": "Some city."})
    answers = await example("capitals").main(backend)
    assert len(answers) == len(backend.requests) >= 20
    assert "What is the capital of Peru? Lima.\n" in capsys.readouterr().out


def test_the_rows_of_capitals_are_questions() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "capitals.jsonl").read_text().splitlines()]
    assert all(set(row) == {"question"} for row in rows)
    assert len({row["question"] for row in rows}) == len(rows) >= 20
