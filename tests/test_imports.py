"""The layers: which module may import which, and what an import may cost."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FOLDERS = {"asyncsgl": ROOT / "asyncsgl", "asyncsgl_engine": ROOT / "engine" / "asyncsgl_engine"}

# A module imports only from its own row and the rows above it.
ROWS = {
    "asyncsgl": (
        ("errors", "sampling", "types", "_optional"),
        ("lang",),
        ("backends", "testing", "testing_server"),
        ("batch.executor", "batch.progress", "batch.tally", "batch.waiting"),  # programs use these
        ("program", "events", "telemetry", "otel"),
        ("batch",),
        ("sync", "cli", "launch_server", "__main__", "__init__"),
    ),
    "asyncsgl_engine": (
        ("errors", "config", "images", "request", "plan", "statistics"),
        (
            "pages",
            "radix",
            "sharing",
            "pattern_cost",
            "stops",
            "sequence",
            "scheduler",
            "answer",
            "background",
            "constraints",
            "antechamber",
            "delivery",
            "draft",
            "flight",
            "inbox",
            "isolation",
        ),
        ("hub",),
        (
            "kv_cache",
            "inputs",
            "image_rows",
            "transfer",
            "attention",
            "sampler",
            "drawing",
            "logits",
            "logprobs",
            "triton_layers",
            "weight_files",
        ),
        ("native",),
        ("detokenizer", "tokenizer", "tokenizer_traits"),
        ("regex_syntax", "schema_faults", "grammar"),
        (
            "device",
            "image_files",
            "image_processor",
            "model",
            "multimodal",
            "vision",
            "forward",
            "layered_forward",
            "recipe",
            "triton_forward",
            "lowering",
            "model_pass",
            "runner",
            "graphs",
            "parallel",
        ),
        ("core",),
        ("loading", "recall", "starting", "profiling", "parallel.follower", "parallel.worker"),
        ("reception", "engine_thread", "engine", "__init__"),
        ("server",),
    ),
}
NO_TORCH = [noun for row in ROWS["asyncsgl_engine"][:2] for noun in row]
NO_TORCH += ["core", "reception", "engine_thread", "engine", "__init__"]
MAY_IMPORT_THE_ENGINE = (
    "asyncsgl.backends.engine_calls",
    "asyncsgl.backends.runtime",
    "asyncsgl.backends.runtime_images",
    "asyncsgl.backends.runtime_prompts",
    "asyncsgl.backends.runtime_server",
    "asyncsgl.cli",
    "asyncsgl.launch_server",
)
DEAR = [
    "aiohttp",
    "anthropic",
    "av",
    "fastapi",
    "google.genai",
    "httptools",
    "httpx",
    "jinja2",
    "litellm",
    "numpy",
    "openai",
    "PIL",
    "pydantic",
    "ray",
    "rich",
    "torch",
    "transformers",
    "typer",
]
# Import names of distributions that need not be installed where the tests run.
DISTRIBUTIONS = {"google": "google-genai", "opentelemetry": "opentelemetry-api"}


@dataclass(frozen=True)
class Import:
    """One import statement's target; ``at_start`` if importing the module runs it."""

    target: str
    line: int
    at_start: bool


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts))
            found[name if parts == ("__init__",) else name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def names_an_extra(node: ast.AST) -> bool:
    """Whether imports in ``node`` fail with the extra named: ``with needs("extra"):``."""
    return isinstance(node, ast.With) and ast.unparse(node.items[0]).startswith("needs(")


def targets(node: ast.Import | ast.ImportFrom, package: list[str]) -> list[str]:
    """Dotted names that one statement asks for, relative ones resolved in ``package``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parent = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*parent, *([node.module] if node.module else [])])
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    known = [name for name in submodules if name in MODULES]
    return known if len(known) == len(submodules) else [*known, base]


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """The imports of a module, those inside functions too, type-only ones left out."""
    path = MODULES[module]
    is_package = path.name == "__init__.py"
    package = module.removesuffix(".__init__").split(".")[: None if is_package else -1]
    found: list[Import] = []

    def visit(node: ast.AST, at_start: bool) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend(Import(name, node.lineno, at_start) for name in targets(node, package))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_start and not inside and not names_an_extra(node))

    visit(ast.parse(path.read_text(encoding="utf-8")), at_start=True)
    return tuple(found)


def row_of(name: str) -> int:
    """The row of a dotted name in its package; a package itself is its ``__init__``."""
    package, _, rest = name.partition(".")
    parts = rest.split(".") if rest else ["__init__"]
    for length in range(len(parts), 0, -1):
        noun = ".".join(parts[:length])
        for number, row in enumerate(ROWS[package]):
            if noun in row:
                return number
    raise AssertionError(f"{name} has no place in the layers: put {parts[0]!r} in one row of ROWS")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_row_and_above(module: str) -> None:
    package = module.partition(".")[0]
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports_of(module)
        if found.target.partition(".")[0] == package and row_of(found.target) > row_of(module)
    ]
    assert wrong == []


@pytest.mark.parametrize("module", MODULES)
def test_the_packages_meet_in_one_place(module: str) -> None:
    other = {"asyncsgl": "asyncsgl_engine", "asyncsgl_engine": "asyncsgl"}
    if module.startswith(MAY_IMPORT_THE_ENGINE):
        return
    forbidden = other[module.partition(".")[0]]
    wrong = [found for found in imports_of(module) if found.target.partition(".")[0] == forbidden]
    assert wrong == []


def test_imports_have_no_cycle() -> None:
    graph = {
        module: {found.target for found in imports_of(module) if found.target in MODULES}
        for module in MODULES
    }
    size = -1
    while size != len(graph):  # what imports nothing, or is imported by nothing, is in no cycle
        size = len(graph)
        wanted = set().union(*graph.values())
        graph = {
            module: {name for name in needs if name in graph}
            for module, needs in graph.items()
            if module in wanted and any(name in graph for name in needs)
        }
    assert graph == {}


@cache
def distributions() -> Mapping[str, list[str]]:
    """The installed distributions by the names under which they are imported."""
    return packages_distributions()


@cache
def declared() -> tuple[set[str], set[str]]:
    """Names of the distributions that the core needs, and of those in the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(lines: list[str]) -> set[str]:
        return {Requirement(line).name.lower().replace("_", "-") for line in lines}

    extras = project["optional-dependencies"]
    return names(project["dependencies"]), set().union(
        *(names(lines) for extra, lines in extras.items() if extra not in {"all", "dev"})
    )


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_imports_is_declared(module: str) -> None:
    core, extras = declared()
    installed = distributions()
    wrong = []
    for found in imports_of(module):
        top = found.target.partition(".")[0]
        if top in sys.stdlib_module_names or top in FOLDERS:
            continue
        names = {
            name.lower().replace("_", "-")
            for name in (DISTRIBUTIONS.get(top), *installed.get(top, [top]))
            if name
        }
        lazily = not found.at_start or module.startswith("asyncsgl_engine")
        if not names & (core | extras if lazily else core):
            wrong.append(f"line {found.line}: {found.target}")
    assert wrong == []


def run_python(code: str) -> str:
    """What ``code`` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'engine'}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_asyncsgl_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import asyncsgl;"
        "print(time.process_time() - start);"  # what else the machine does is not counted
        f"print([name for name in {DEAR!r} if name in sys.modules])"
    )
    runs = [run_python(code).splitlines() for _ in range(3)]
    assert {run[1] for run in runs} == {"[]"}
    assert min(float(run[0]) for run in runs) < 0.3


def test_modules_that_only_posix_has_are_not_needed_to_import() -> None:
    names = [
        name for name in MODULES if name.startswith("asyncsgl.") and not name.endswith("__main__")
    ]
    code = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'pwd', 'termios']))\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "print(len(sys.modules))"
    )
    assert int(run_python(code)) > len(names)


def test_the_books_of_the_engine_never_import_torch() -> None:
    names = [
        name
        for name in MODULES
        if name.startswith("asyncsgl_engine.") and name.split(".")[1] in NO_TORCH
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(name + ' imports torch')\n"
        "print(len(sys.modules))"
    )
    assert names
    assert int(run_python(code)) > 0
