"""The checks of asyncsgl: ``nox`` runs what a change must pass, ``nox -l`` lists the rest."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import zipfile
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.error_on_missing_interpreters = True
nox.options.default_venv_backend = "virtualenv"

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
TESTED = "anthropic,engine,http,openai,otel,prices,serve,vertex,video"
LLMOCK = "llmock==0.2.2"
SGLANG = ("sglang==0.5.23", "torchvision==0.28.0")
AIMOCK = "@copilotkit/aimock@1.43.0"
SOURCES = ("asyncsgl", "engine", "tests", "tools", "examples", "benchmarks", "noxfile.py")
WHEEL_FILES = {
    f"{package}/{name}"
    for package in ("asyncsgl", "asyncsgl_engine")
    for name in ("__init__.py", "errors.py", "py.typed")
}
GPU_BENCHMARK = "benchmarks/gpu.py"
DOCS_ENV = {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement, not a warning


def install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """Install the tools of ``groups`` and the project with ``extras``, at the tested versions."""
    tools = nox.project.dependency_groups(PYPROJECT, *groups)
    session.install("-c", "constraints.txt", *tools, "-e", f".[{extras}]" if extras else ".")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests; what follows ``--`` goes to pytest."""
    install(session, "tests", extras=TESTED)
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the format, the lint rules, and that the wheel holds both packages."""
    session.install("-c", "constraints.txt", *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("ruff", "check", *SOURCES)
    folder = Path(session.create_tmp())
    session.run("hatchling", "build", "-t", "wheel", "-d", str(folder))
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            missing = WHEEL_FILES.difference(archive.namelist())
        wheel.unlink()
        if missing:
            session.error(f"{wheel.name} lacks {', '.join(sorted(missing))}")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of everything, with mypy (strict) and with pyright."""
    install(session, "types", extras=TESTED)
    session.run("mypy")
    session.run("pyright")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into ``site/``; warnings are errors."""
    install(session, "docs")
    session.run("mkdocs", *(session.posargs or ("build", "--strict")), env=DOCS_ENV)


@nox.session(name="property", default=False)
def properties(session: nox.Session) -> None:
    """Search long for counter-examples to the properties in ``tests/property``."""
    install(session, "tests", extras=TESTED)
    pytest = ("pytest", "--timeout=0", "--hypothesis-profile=thorough")
    session.run(*pytest, *(session.posargs or ("tests/property",)))


@nox.session(python=PYTHONS[0], default=False)
def minimums(session: nox.Session) -> None:
    """Run the front end's tests on the oldest versions that the package allows."""
    tools = nox.project.dependency_groups(PYPROJECT, "tests")
    oldest = [
        f"{requirement.name}=={bound.version}"
        for requirement in map(Requirement, PYPROJECT["project"]["dependencies"])
        for bound in requirement.specifier
        if bound.operator == ">="
    ]
    oracle = "transformers"  # of chat templates
    session.install(*tools, *oldest, oracle, "-e", ".[otel,video]")
    session.run("pytest", *(session.posargs or ("tests/frontend", "tests/batch", "tests/sync")))


@nox.session(default=False)
def litellm(session: nox.Session) -> None:
    """Test LiteLLM in an environment of its own, and OpenAI with the older SDK that it wants."""
    tools = nox.project.dependency_groups(PYPROJECT, "tests")
    session.install("-c", "constraints-litellm.txt", *tools, "-e", ".[http,litellm,openai]")
    names = ("test_contract.py", "test_litellm.py", "test_openai.py")
    files = [*(f"tests/backends/{name}" for name in names), "tests/conformance"]
    chosen = ("-k", "litellm or openai or azure", *files)
    session.run("pytest", "-W", "default", *(session.posargs or chosen))


@nox.session(default=False)
def llmock(session: nox.Session) -> None:
    """Run the backends against llmock, a fake of several services, in an environment of its own."""
    install(session, "tests", extras=TESTED)
    folder = Path(session.create_tmp()) / "llmock"  # it brings a plugin for pytest along
    session.run("python", "-m", "venv", str(folder))
    session.run(str(folder / "bin" / "pip"), "install", "-q", LLMOCK, external=True)
    program = {"ASYNCSGL_LLMOCK": str(folder / "bin" / "llmock")}
    session.run("pytest", *(session.posargs or ("tests/external/test_llmock.py",)), env=program)


@nox.session(default=False)
def aimock(session: nox.Session) -> None:
    """Run the backends against aimock, another fake of several services; needs npm."""
    if shutil.which("npm") is None:
        session.skip("npm is not installed")
    install(session, "tests", extras=TESTED)
    folder = Path(session.create_tmp()) / "aimock"
    npm = ("npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder))
    session.run(*npm, AIMOCK, external=True)
    program = {"ASYNCSGL_AIMOCK": str(folder / "node_modules" / ".bin" / "aimock")}
    session.run("pytest", *(session.posargs or ("tests/external/test_aimock.py",)), env=program)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Test and measure on a CUDA device; with --no-venv, by what the machine has installed."""
    if session.venv_backend == "none":
        places = {"PYTHONPATH": f".{os.pathsep}engine"}
        alone = ("-c", os.devnull, "--rootdir=.", "--noconftest", "tests/engine/test_gpu.py")
        session.run("python", "-m", "pytest", *alone, env=places, external=True)
        session.run("python", GPU_BENCHMARK, *session.posargs, env=places, external=True)
        return
    install(session, "tests", extras=f"{TESTED},gpu")
    session.run("pytest", "-m", "gpu")
    session.run("python", GPU_BENCHMARK, *session.posargs)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Run the tests that take long: many cancellations, long lives, large batches."""
    install(session, "tests", extras=TESTED)
    session.run("pytest", "--timeout=0", "-m", "soak", *session.posargs)


@nox.session(default=False)
def api(session: nox.Session) -> None:
    """Send thousands of generated requests to the server, by its own OpenAPI document."""
    install(session, "tests", extras="engine,serve,openai,anthropic,vertex,prices")
    session.install("-c", "constraints.txt", "schemathesis>=4.32")
    session.run("pytest", "--timeout=0", "-m", "soak", "tests/server/test_document.py")


@nox.session(default=False)
def sglang(session: nox.Session) -> None:
    """Run SGLang's own frontend against the server, and judge both sides by its own models."""
    install(session, "tests", extras=TESTED)
    session.install("--no-deps", SGLANG[0])
    # what its frontend and its models import; its kernels are left out
    session.install("msgspec", "orjson", "psutil", "pybase64", "pyzmq", "requests", "tqdm")
    tests = ("tests/server/test_sglang_frontend.py", "tests/server/test_sglang_contract.py")
    session.run("pytest", *tests)


@nox.session(name="sglang-server", default=False)
def sglang_server(session: nox.Session) -> None:
    """Run the endpoint against SGLang's own server, on the processor; takes minutes and 3 GB."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        session.skip("SGLang has wheels for Linux on x86-64")
    install(session, "tests", extras=TESTED)
    folder = Path(session.create_tmp()) / "sglang"
    session.run("python", "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "pip"), "install", "-q")
    session.run(*pip, "-r", "constraints-sglang.txt", external=True)
    session.run(*pip, "--no-deps", *SGLANG, external=True)
    program = {"ASYNCSGL_SGLANG": str(folder / "bin" / "python")}
    session.run(
        "pytest", *(session.posargs or ("tests/external/test_sglang_server.py",)), env=program
    )


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run the benchmarks, all of them or the files named after ``--``."""
    install(session, "tests", "bench", extras=TESTED)
    scripts = {str(path) for path in Path("benchmarks").glob("*.py")} - {GPU_BENCHMARK}
    for script in session.posargs or sorted(scripts):
        session.run("python", script)
