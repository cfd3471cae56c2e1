"""Print a text while it is being written."""

from __future__ import annotations

import asyncio

import asyncsgl as sgl


@sgl.function
async def tell(s: sgl.ProgramState, topic: str) -> None:
    """Tell a very short story."""
    s += sgl.user(f"Tell a story about {topic} in three sentences.")
    s += sgl.assistant(sgl.gen("story", max_tokens=120, temperature=0))


async def main(backend: sgl.Backend | None = None) -> sgl.State:
    """Run it once and watch."""
    async with (
        backend or sgl.Runtime() as model,
        tell.stream(topic="a lighthouse", backend=model) as run,
    ):
        async for piece in run.text("story"):
            print(piece, end="", flush=True)
        state: sgl.State = await run.result()
    print()
    return state


if __name__ == "__main__":
    asyncio.run(main())
