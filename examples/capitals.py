"""A program for the rows of capitals.jsonl.

Run it for every row with::

    asyncsgl batch examples/capitals.jsonl --program examples/capitals.py:capital
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import asyncsgl as sgl

ROWS = Path(__file__).with_name("capitals.jsonl")


@sgl.function
async def capital(s: sgl.ProgramState, question: str) -> None:
    """Answer in one sentence."""
    s += sgl.system("Answer the question in one short sentence.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=32, temperature=0))


async def main(backend: sgl.Backend | None = None) -> list[str]:
    """Answer all rows at once, and print them in order."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    async with backend or sgl.Runtime() as model:
        states = await capital.run_batch(rows, backend=model, progress_bar=True)
    answers = [state["answer"] for state in states]
    for row, answer in zip(rows, answers, strict=True):
        print(f"{row['question']} {answer}")
    return answers


if __name__ == "__main__":
    asyncio.run(main())
