"""The kinds of programs that prefix sharing is for, at a small scale.

Lengths are fixed and the end of sequence is ignored, so every backend does the same work; what
a program appends between its calls does not depend on what a model wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncsgl as sgl
from benchmarks.suite.material import Material

__all__ = ["CASES", "SCHEMA", "Case", "Row"]

Row = Mapping[str, Any]

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "trade": {"type": "string", "maxLength": 12},
            "town": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "member": {"type": "boolean"},
        },
        "required": ["name", "trade", "town", "age", "member"],
        "additionalProperties": False,
    }
)
_TOOLS = ("lookup", "add", "finish")
_VIEWS = ("clarity", "evidence", "structure", "style")


@dataclass(frozen=True)
class Case:
    """A program and the rows to run it on, all at once.

    Args:
        name: for the command line.
        title: for the table.
        program: takes a row's values by name.
        rows: for a scale and a seed.
        constrained: its answers follow `SCHEMA`.
    """

    name: str
    title: str
    program: sgl.Program
    rows: Callable[[float, str], Sequence[Row]]
    constrained: bool = False


def _count(scale: float, number: int) -> int:
    return max(1, round(scale * number))


# -- few-shot questions -------------------------------------------------------------------------


@sgl.function
async def few_shot(s: sgl.ProgramState, examples: str, question: str) -> None:
    s += examples + f"Question: {question}\nAnswer:"
    s += sgl.gen("answer", max_tokens=24)


def _few_shot_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"few-shot {seed}")
    worked = [material.sum_question() for _ in range(12)]
    examples = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in worked)
    asked = [material.sum_question()[0] for _ in range(_count(scale, 16))]
    return [{"examples": examples, "question": question} for question in asked]


# -- tree of thought ----------------------------------------------------------------------------


@sgl.function
async def tree_of_thought(s: sgl.ProgramState, task: str, width: int, depth: int) -> None:
    """Propose several next steps, judge each, go on from the best; twice or more."""
    s += f"Solve the task step by step.\n\nTask: {task}\n"
    for level in range(depth):
        async with s.fork(width) as branches:
            for number, branch in enumerate(branches):
                branch += f"Idea {number + 1} for step {level + 1}:"
                branch += sgl.gen(f"idea_{level}", max_tokens=32)
                branch += "\nIs this idea good?"
                branch += sgl.select(f"verdict_{level}", [" yes", " no"])
        ideas: Any = await s[f"idea_{level}"]
        verdicts: Any = await s[f"verdict_{level}"]
        best = verdicts.index(" yes") if " yes" in verdicts else 0
        s += f"Idea {best + 1} for step {level + 1}:{ideas[best]}\n"
    s += "So the answer is" + sgl.gen("answer", max_tokens=24)


def _tree_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"tree {seed}")
    return [
        {"task": f"{material.paragraph(8)} {material.sum_question()[0]}", "width": 4, "depth": 2}
        for _ in range(_count(scale, 3))
    ]


# -- skeleton of thought ------------------------------------------------------------------------


@sgl.function
async def skeleton_of_thought(
    s: sgl.ProgramState, topic: str, background: str, points: int
) -> None:
    """Write an outline, then all of its points at the same time."""
    s += f"{background}\n\nWrite about {topic}. First the outline:\n"
    s += sgl.gen("outline", max_tokens=48) + "\n\nNow the points in full.\n"
    async with s.fork(points) as branches:
        for number, branch in enumerate(branches, 1):
            branch += f"Point {number}:" + sgl.gen("point", max_tokens=48) + "\n"
    s += "In short:" + sgl.gen("summary", max_tokens=24)


def _skeleton_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"skeleton {seed}")
    return [
        {"topic": material.topic(), "background": material.paragraph(20), "points": 5}
        for _ in range(_count(scale, 3))
    ]


# -- a chat of several turns ----------------------------------------------------------------------


@sgl.function
async def chat(s: sgl.ProgramState, system: str, turns: Sequence[str]) -> None:
    s += sgl.system(system)
    for number, turn in enumerate(turns):
        s += sgl.user(turn)
        s += sgl.assistant(sgl.gen(f"reply_{number}", max_tokens=32))


def _chat_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"chat {seed}")
    system = f"You answer questions about the village. {material.paragraph(16)}"
    return [
        {"system": system, "turns": [material.paragraph(4) for _ in range(4)]}
        for _ in range(_count(scale, 6))
    ]


# -- agents ---------------------------------------------------------------------------------------


@sgl.function
async def agent(s: sgl.ProgramState, manual: str, task: str, observations: Sequence[str]) -> None:
    """Think, act, observe. What is observed is fixed, so every backend walks the same way."""
    s += f"{manual}\n\nTask: {task}\n"
    for number, observation in enumerate(observations):
        s += "Thought:" + sgl.gen(f"thought_{number}", max_tokens=24)
        s += "\nAction: " + sgl.select(f"action_{number}", list(_TOOLS))
        s += f"\nObservation: {observation}\n"
    s += "Final answer:" + sgl.gen("answer", max_tokens=16)


def _agent_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"agent {seed}")
    manual = (
        "You solve tasks with tools. Write a thought, then name a tool, then read what comes "
        f"back. The tools are {', '.join(_TOOLS)}. Here is what happened in an earlier task.\n"
        f"{material.paragraph(24)}"
    )
    return [
        {
            "manual": manual,
            "task": material.sum_question()[0],
            "observations": [material.paragraph(2) for _ in range(3)],
        }
        for _ in range(_count(scale, 4))
    ]


# -- judging --------------------------------------------------------------------------------------


@sgl.function
async def judge(s: sgl.ProgramState, rubric: str, essay: str) -> None:
    """Look at an essay from several sides at once, then give a verdict."""
    s += f"{rubric}\n\nEssay: {essay}\n\n"
    async with s.fork(len(_VIEWS)) as branches:
        for view, branch in zip(_VIEWS, branches, strict=True):
            branch += f"On its {view}:" + sgl.gen("note", max_tokens=32)
            branch += f"\nGrade for {view}:" + sgl.select("grade", [" 1", " 2", " 3", " 4", " 5"])
    s += "Grades:" + ",".join(await _listed(s, "grade")) + "\nVerdict:"
    s += sgl.gen("verdict", max_tokens=24)


async def _listed(s: sgl.ProgramState, name: str) -> list[str]:
    values: Any = await s[name]
    return list(values)


def _judge_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"judge {seed}")
    rubric = f"Judge the essay fairly. {material.paragraph(12)}"
    return [{"rubric": rubric, "essay": material.paragraph(20)} for _ in range(_count(scale, 4))]


# -- JSON -----------------------------------------------------------------------------------------


@sgl.function
async def extract(s: sgl.ProgramState, guide: str, sentence: str, schema: str | None) -> None:
    s += f"{guide}\n\nText: {sentence}\nJSON:"
    s += sgl.gen("record", max_tokens=96, json_schema=schema)


def _extract_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"json {seed}")
    shown = []
    for _ in range(5):
        person = material.person()
        record = {
            "name": person.name, "trade": person.trade, "town": person.town, "age": person.age,
            "member": person.age % 2 == 0,
        }  # fmt: skip
        shown.append(f"Text: {person.sentence}\nJSON:{json.dumps(record)}")
    guide = "Write down what the text says as JSON.\n\n" + "\n\n".join(shown)
    return [
        {"guide": guide, "sentence": material.person().sentence} for _ in range(_count(scale, 16))
    ]


# -- documents ------------------------------------------------------------------------------------


@sgl.function
async def with_documents(s: sgl.ProgramState, documents: Sequence[str], question: str) -> None:
    for number, document in enumerate(documents, 1):
        s += f"Document {number}: {document}\n\n"
    s += f"Question: {question}\nAnswer:" + sgl.gen("answer", max_tokens=24)


def _document_rows(scale: float, seed: str) -> Sequence[Row]:
    material = Material(f"documents {seed}")
    shelf = [material.paragraph(28) for _ in range(3)]
    rows = []
    for number in range(_count(scale, 12)):
        first = number % 3
        found = [shelf[first], shelf[(first + 1) % 3]]
        rows.append({"documents": found, "question": material.sum_question()[0]})
    return rows


CASES = {
    case.name: case
    for case in (
        Case("few-shot", "few-shot questions", few_shot, _few_shot_rows),
        Case("tree", "tree of thought", tree_of_thought, _tree_rows),
        Case("skeleton", "skeleton of thought", skeleton_of_thought, _skeleton_rows),
        Case("chat", "chat of four turns", chat, _chat_rows),
        Case("agent", "agents with tools", agent, _agent_rows),
        Case("judge", "judge with branches", judge, _judge_rows),
        Case("json", "JSON decoding", extract, _extract_rows, constrained=True),
        Case("documents", "questions on documents", with_documents, _document_rows),
    )
}
