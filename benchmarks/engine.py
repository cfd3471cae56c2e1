"""The engine beside its peers: workloads A to E, by turns, on one machine.

    python benchmarks/engine.py [--peers FOLDER] [--workloads ABCDE] [--dtype bfloat16 float32]

`FOLDER` (or `ASYNCSGL_PEERS`) holds virtual environments with vLLM, OpenVINO GenAI or
transformers; `--peer vllm=PYTHON` names an interpreter, and `--only transformers` takes the one
that this runs in, too. Peers that are not there are left out, and said to be. Every contestant
is a process of its own, loaded once and idle while another one runs. Greedy, the end of sequence ignored, token ids in and out: each run makes exactly as many
tokens as asked for. The time is that from handing over the first request to the end of the last;
a warm-up of the whole workload comes before. Medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncsgl_engine.hub import resolve_model
from benchmarks.peers import report
from benchmarks.peers.contest import Plan, contest
from benchmarks.peers.contestant import Team
from benchmarks.peers.finding import OURS, PEERS, find_teams
from benchmarks.peers.result import Result
from benchmarks.peers.roofline import Limits, ModelSize, least_seconds
from benchmarks.peers.workloads import TITLES, build


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder")
    parser.add_argument("--workloads", default="".join(TITLES), help="letters")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="*", choices=list(PEERS), help="peers; none: ours alone")
    parser.add_argument("--peers", type=Path, default=os.environ.get("ASYNCSGL_PEERS"))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for a workload's runs")
    parser.add_argument("--quiet-wait", type=float, default=5.0, help="seconds to wait for others")
    parser.add_argument("--max-foreign", type=float, default=0.06, help="CPUs others may use")
    parser.add_argument("--profile", action="store_true", help="say where our time goes")
    parser.add_argument("--warm-up-with", default="", help="a short workload, to save time")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--show", type=Path, nargs="+", help="print such files; measure nothing")
    return parser.parse_args()


def note(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def teams(asked: argparse.Namespace, model: Path) -> list[Team]:
    """Ours and the peers that can be found."""
    names = list(PEERS) if asked.only is None else asked.only
    given = {name: Path(python) for name, python in (each.split("=", 1) for each in asked.peer)}
    found = [Team(OURS, "ours", Path(sys.executable), str(model))]
    here = bool(asked.only)  # transformers is always there, and only measured where asked for
    for team in find_teams(names, given, asked.peers, model, also_here=here):
        if isinstance(team, str):
            note(team)
        else:
            found.append(team)
    return found


def machine(threads: int) -> dict[str, Any]:
    """What the machine is, and what it can do at most."""
    command = [sys.executable, "-m", "benchmarks.peers.machine", "--threads", str(threads)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout)
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": threads} | figures


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def bounds(asked: argparse.Namespace, figures: dict[str, Any], model: Path) -> dict[str, float]:
    """Most output tokens a second that the machine allows, by dtype and workload."""
    size = ModelSize.read(model)
    most = {}
    for dtype in asked.dtype:
        limits = Limits.of(figures["limits"], dtype)
        for name in asked.workloads:
            workload = build(name, 0)
            least = least_seconds(workload, size, limits, dtype)
            most[f"{dtype} {name}"] = workload.output_tokens / least
    return most


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """All results, as they are written."""
    model = Path(resolve_model(asked.model).path)
    plan = Plan(
        asked.workloads,
        asked.runs,
        asked.threads,
        asked.budget,
        asked.quiet_wait,
        asked.max_foreign,
        asked.warm_up_with,
    )
    logs = Path(tempfile.mkdtemp(prefix="asyncsgl-bench-"))
    note(f"what the contestants print is in {logs}")
    figures = machine(asked.threads)
    sides = teams(asked, model)
    measured: dict[str, Any] = {
        "machine": figures,
        "command": sys.argv[1:],
        "bounds": bounds(asked, figures, model),
        "results": [],
    }
    for dtype in asked.dtype:
        for result in contest(sides, dtype, plan, logs, note, asked.profile):
            measured["results"].append(result.as_json())
            if asked.json is not None:  # each time: a run that is cut short keeps what it has
                asked.json.write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def show(measured: Sequence[dict[str, Any]], most_foreign: float) -> None:
    """Print what one or several measurements gave, as one set of tables."""
    results = [Result.from_json(one) for each in measured for one in each["results"]]
    most = {name: rate for each in measured for name, rate in each["bounds"].items()}
    tables = [report.rates(results, most_foreign)]
    if len({result.team for result in results}) > 1:
        tables += [report.ratios(results), report.same_outputs(results)]
    tables.append(report.shares(results, most))
    if any(result.phases for result in results):
        tables.append(report.phases(results))
    print("\n\n".join(tables), flush=True)


def main() -> None:
    """Measure, and print what came out; or print what came out before."""
    asked = arguments()
    if asked.show:
        show([json.loads(path.read_text()) for path in asked.show], asked.max_foreign)
        return
    show([measure(asked)], asked.max_foreign)


if __name__ == "__main__":
    main()
