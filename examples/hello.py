"""One question to a language model in this process."""

from __future__ import annotations

import asyncio

import asyncsgl as sgl


@sgl.function
async def hello(s: sgl.ProgramState, name: str) -> None:
    """Say hello to somebody."""
    s += sgl.user(f"Write one friendly sentence that greets {name}.")
    s += sgl.assistant(sgl.gen("greeting", max_tokens=48, temperature=0))


async def main(backend: sgl.Backend | None = None) -> sgl.State:
    """Run it once."""
    async with backend or sgl.Runtime() as model:
        state: sgl.State = await hello.run(name="Ada", backend=model)
    print(state["greeting"])
    print(state.usage)
    return state


if __name__ == "__main__":
    asyncio.run(main())
