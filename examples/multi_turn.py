"""A conversation in which each answer is the ground for the next question."""

from __future__ import annotations

import asyncio

import asyncsgl as sgl


@sgl.function
async def interview(s: sgl.ProgramState, country: str) -> str:
    """Ask for a city, then for something about it."""
    s += sgl.system("Answer each question in one short sentence.")
    s += sgl.user(f"What is the capital of {country}?")
    s += sgl.assistant(sgl.gen("capital", max_tokens=24, temperature=0))
    s += sgl.user("What is this city known for?")
    s += sgl.assistant(sgl.gen("known_for", max_tokens=48, temperature=0))
    return f"{await s['capital']} {await s['known_for']}"


async def main(backend: sgl.Backend | None = None) -> sgl.State:
    """Run it once and show the turns."""
    async with backend or sgl.Runtime() as model:
        state: sgl.State = await interview.run(country="Japan", backend=model)
    for message in state.messages():
        print(f"{message['role']:>9}: {message['content']}")
    return state


if __name__ == "__main__":
    asyncio.run(main())
