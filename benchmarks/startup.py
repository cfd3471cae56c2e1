"""From the start of a process to the first token, ours beside the peers'.

    python benchmarks/startup.py [--peers FOLDER] [--starts 5] [--only transformers openvino]

Every start is a process of its own; the contestants take turns. The files are in the page cache:
one start of each, which does not count, comes before. `FOLDER` (or `ASYNCSGL_PEERS`) is that of
`benchmarks/engine.py`; transformers is started in the environment of this process too. Of ours the
first start of a model is shown apart, with a cache folder that has the compiled code alone, and so
is `asyncsgl batch` on a file of one row, from its start to its end. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asyncsgl_engine.hub import resolve_model
from asyncsgl_engine.hub.cache import default_cache_root
from benchmarks.peers.contestant import Team
from benchmarks.peers.finding import OURS, find_teams
from benchmarks.peers.starting import STARTS, Marks

ROOT = Path(__file__).parents[1]
_FIRST, _BATCH = "asyncsgl, first start", "asyncsgl batch, one row"
_LIMIT_S = 300.0


@dataclass(frozen=True)
class Start:
    """One start, in seconds.

    Args:
        imports: from the start of the process until what it imports by name is there.
        load: until prompts can be given.
        first: until one token is there.
        total: of these; of a command, until its end.
        peak_mib: most memory that it held; 0 where that is not known.
        answer: what it said.
    """

    imports: float
    load: float
    first: float
    total: float
    peak_mib: float = 0.0
    answer: str = ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="*", choices=sorted(STARTS), help="peers; none: ours alone")
    parser.add_argument("--peers", type=Path, default=os.environ.get("ASYNCSGL_PEERS"))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write every start there too")
    return parser.parse_args()


def environment(threads: int, cache: Path | None = None) -> dict[str, str]:
    """What a start runs in."""
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "engine")]),
    }
    moved = {} if cache is None else {"ASYNCSGL_CACHE": str(cache)}
    return {**os.environ, **settings, **moved}


def begin(team: Team, asked: argparse.Namespace, cache: Path | None = None) -> Start:
    """Start a contestant once."""
    command = [str(team.python), "-m", "benchmarks.peers.starting", team.name]
    command += ["--model", team.model, "--dtype", asked.dtype, "--threads", str(asked.threads)]
    begun = time.monotonic()
    done = run(command, environment(asked.threads, cache))
    marks = Marks(**json.loads(done.splitlines()[-1]))
    return Start(
        marks.imported - begun,
        marks.loaded - marks.imported,
        marks.answered - marks.loaded,
        marks.answered - begun,
        marks.peak_mib,
        marks.answer,
    )


def begin_first(team: Team, asked: argparse.Namespace) -> Start:
    """Start ours where nothing is known of the model, but the code is compiled."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "native").symlink_to(default_cache_root() / "native")
        return begin(team, asked, Path(folder))


def run_batch(asked: argparse.Namespace) -> Start:
    """Run `asyncsgl batch` on one row."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text('{"question": "What is the capital of France?"}\n')
        begun = time.monotonic()
        run(
            [sys.executable, "-m", "asyncsgl", "batch", str(rows), "--model", asked.model],
            environment(asked.threads),
        )
        return Start(0.0, 0.0, 0.0, time.monotonic() - begun)


def run(command: Sequence[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=_LIMIT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def ways(asked: argparse.Namespace) -> dict[str, Callable[[], Start]]:
    """What can be started here, by name."""
    model = Path(resolve_model(asked.model).path)
    ours = Team(OURS, "starting", Path(sys.executable), str(model))
    found: dict[str, Callable[[], Start]] = {
        OURS: lambda: begin(ours, asked),
        _FIRST: lambda: begin_first(ours, asked),
        _BATCH: lambda: run_batch(asked),
    }
    names = sorted(set(STARTS) - {OURS}) if asked.only is None else asked.only
    given = {name: Path(python) for name, python in (each.split("=", 1) for each in asked.peer)}
    for team in find_teams(names, given, asked.peers, model, also_here=True):
        if isinstance(team, str):
            note(team)
        else:
            found[team.name] = lambda team=team: begin(team, asked)  # type: ignore[misc]
    return found


def measure(asked: argparse.Namespace) -> dict[str, list[Start]]:
    """Every start that counts, by name."""
    started = ways(asked)
    results: dict[str, list[Start]] = {}
    for name in list(started):
        try:
            started[name]()
            results[name] = []
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            note(f"{name}: left out, it does not start: {error}")
            del started[name]
    for _ in range(asked.starts):
        for name, start in started.items():
            results[name].append(start())
            note(f"{name}: {results[name][-1].total:.2f} s")
    return results


def note(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def table(results: Mapping[str, Sequence[Start]]) -> str:
    """The medians, and the range of the totals."""
    lines = ["| s | import | load | first token | in all | range | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, starts in results.items():
        totals = [start.total for start in starts]
        cells = [
            *(
                f"{middle:.2f}" if (middle := _median(starts, part)) else ""
                for part in ("imports", "load", "first", "total")
            ),
            f"{min(totals):.2f} to {max(totals):.2f}",
            f"{peak:.0f}" if (peak := _median(starts, "peak_mib")) else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _median(starts: Sequence[Start], part: str) -> float:
    return float(statistics.median(getattr(start, part) for start in starts))


def main() -> None:
    asked = arguments()
    if shutil.which(os.environ.get("CC", "cc")) is None:
        note("there is no C compiler here: every start of ours is one with transformers")
    results = measure(asked)
    print(table(results), flush=True)
    if asked.json is not None:
        written = {name: [asdict(start) for start in starts] for name, starts in results.items()}
        asked.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
