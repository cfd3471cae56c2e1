"""Whole programs: what the prefix cache saves, and the same over vLLM's server.

    python benchmarks/programs.py [--only few-shot tree] [--scale 1.0] [--peers FOLDER]

Eight kinds of programs, all rows of one at once, on our engine, on the same without its prefix
cache, and, where `FOLDER` (or `ASYNCSGL_PEERS`) has an environment with vLLM, over its OpenAI
server. Texts are drawn anew for each run; lengths are fixed, the end of sequence is ignored, and
what a program appends does not depend on what the model wrote. The hit rate stands beside that
of a cache without limits, counted from the tokens that were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import asyncsgl as sgl
from asyncsgl_engine.hub import resolve_model
from benchmarks.peers.finding import find_teams
from benchmarks.peers.report import table
from benchmarks.suite.measuring import Outcome, run_case
from benchmarks.suite.programs import CASES
from benchmarks.suite.sides import Side, local, vllm

ON, OFF, VLLM = "ours", "cache off", "vllm server"
MOST_FOREIGN = 0.1  # CPUs that others may use before a run counts as disturbed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", type=Path, default=os.environ.get("ASYNCSGL_PEERS"))
    parser.add_argument("--no-peers", action="store_true", help="our engine alone")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--show", type=Path, nargs="+", help="print such files; measure nothing")
    return parser.parse_args()


def note(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


async def sides(asked: argparse.Namespace, model: Path, stack: AsyncExitStack) -> list[Side]:
    """All the places that can be had."""
    shared = (str(model), asked.dtype, asked.threads)
    found = [
        await stack.enter_async_context(local(ON, *shared, cache=True)),
        await stack.enter_async_context(local(OFF, *shared, cache=False)),
    ]
    if asked.no_peers:
        return found
    [team] = find_teams(["vllm"], {}, asked.peers, model)
    if isinstance(team, str):
        note(team)
        return found
    log = Path(tempfile.mkdtemp(prefix="asyncsgl-bench-")) / "vllm.log"
    note(f"starting vLLM's server; its log is {log}")
    try:
        found.append(await stack.enter_async_context(vllm(team.python, *shared, log)))
    except RuntimeError as error:
        note(str(error))
    return found


async def measure(asked: argparse.Namespace) -> AsyncGenerator[list[Outcome], None]:
    """Run every case on every side, by turns; the median run of each counts."""
    async with AsyncExitStack() as stack:
        places = await sides(asked, Path(resolve_model(asked.model).path), stack)
        runtime = places[0].backend
        assert isinstance(runtime, sgl.Runtime)
        tokenizer = runtime.get_tokenizer()

        def encode(text: str) -> Sequence[int]:
            ids: Sequence[int] = tokenizer.encode(text)
            return ids

        for name in asked.only:
            for side in places:
                await run_case(CASES[name], side, asked.scale / 4, "warm-up", encode)
            runs: dict[str, list[Outcome]] = {side.name: [] for side in places}
            for number in range(asked.runs):
                for side in places:
                    one = await run_case(CASES[name], side, asked.scale, str(number), encode)
                    note(f"{name}, {side.name}: {one.wall_s:.2f} s")
                    runs[side.name].append(one)
            for done in runs.values():
                done.sort(key=lambda outcome: outcome.wall_s)
            yield [done[len(done) // 2] for done in runs.values()]


async def collect(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All results, as they are written: after each case, lest a run cut short loses them."""
    rows: list[dict[str, Any]] = []
    async with aclosing(measure(asked)) as cases:
        async for outcomes in cases:
            rows += as_rows(outcomes)
            if asked.json is not None:
                value = {"command": sys.argv[1:], "results": rows}
                asked.json.write_text(json.dumps(value, indent=1) + "\n")
    return rows


def as_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The outcomes as they are written: in place of the texts, how many are as ours."""
    ours = {outcome.case: outcome.texts for outcome in outcomes if outcome.side == ON}
    return [
        outcome.as_json()
        | {"same": sum(a == b for a, b in zip(outcome.texts, ours[outcome.case], strict=True))}
        for outcome in outcomes
    ]


def speeds(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds on each side, and how many times ours is faster."""
    lines = []
    for name, sides in by_case(rows).items():
        ours = sides[ON]
        line = [CASES[name].title, *(f"{ours[key]}" for key in ("rows", "calls", "output_tokens"))]
        line.append(f"{ours['wall_s']:.2f}")
        for other in (OFF, VLLM):
            side = sides.get(other)
            line += [_star(side), f"{side['wall_s'] / ours['wall_s']:.2f}"] if side else ["-", "-"]
        lines.append(line)
    columns = ["rows", "calls", "tokens made", "ours s", "cache off s", "off/ours"]
    return table("program", [*columns, "vLLM server s", "vLLM/ours"], lines)


def _star(side: dict[str, Any]) -> str:
    """Seconds, with a star where other processes disturbed them."""
    return f"{side['wall_s']:.2f}" + ("*" if (side["foreign_cpus"] or 0.0) > MOST_FOREIGN else "")


def hits(rows: Sequence[dict[str, Any]]) -> str:
    """Hit rates beside the best that is possible."""
    lines = []
    for name, sides in by_case(rows).items():
        line = [CASES[name].title, f"{sides[ON]['prompt_tokens']:.0f}"]
        for each in (ON, VLLM):
            side = sides.get(each)
            rates = [f"{side[key]:.1%}" for key in ("hit_rate", "best_hit_rate")] if side else []
            line += rates or ["-", "-"]
        lines.append([*line, f"{sides[OFF]['same']} of {sides[OFF]['rows']}"])
    columns = ["prompt tokens", "hit rate", "best possible", "vLLM", "best possible there"]
    return table("program", [*columns, "same text on and off"], lines)


def by_case(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["side"]] = row
    return found


def main() -> None:
    """Measure, and print what came out; or print what came out before."""
    asked = arguments()
    if asked.show:
        files = [json.loads(path.read_text()) for path in asked.show]
        rows = [row for each in files for row in each["results"]]
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the server it started
        rows = asyncio.run(collect(asked))
    print(f"{speeds(rows)}\n\n{hits(rows)}", flush=True)


if __name__ == "__main__":
    main()
