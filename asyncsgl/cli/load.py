"""Finds the object that ``FILE_OR_MODULE:NAME`` names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import BatchError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["load_object"]

T = TypeVar("T")


def load_object(spec: str, kind: type[T], how: str) -> T:
    """Import the file or module of ``spec`` and give the object it names.

    ``NAME`` may be left out where the module has only one object of this kind.

    Args:
        spec: ``path/to/file.py:name`` or ``package.module:name``.
        kind: the class of the object.
        how: how to make one, for error messages: ``"decorate it with @asyncsgl.function"``.

    Raises:
        BatchError: there is no such file, module or object, or importing it failed; names
            the line.
    """
    where, _, name = spec.partition(":")
    module = _import_file(Path(where)) if _is_file(where) else _import_module(where)
    own = {key: value for key, value in vars(module).items() if isinstance(value, kind)}
    if not name:
        if len(own) != 1:
            found = f"has {', '.join(own)}" if own else f"has no {kind.__name__}"
            raise BatchError(f"{where} {found}: name one, as in {where}:NAME")
        return next(iter(own.values()))
    if name in own:
        return own[name]
    if hasattr(module, name):
        raise BatchError(f"{name} in {where} is no {kind.__name__.lower()}: {how}")
    near = get_close_matches(name, own, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; it has: {', '.join(own) or 'none'}"
    raise BatchError(f"{where} has no {kind.__name__.lower()} {name!r}{hint}")


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BatchError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BatchError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as for a script
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BatchError(f"cannot import {path}: {_explained(error, path.name)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(error.name or name):
            raise BatchError(
                f"there is no module {name!r} (a file is named as in path/to/{name}.py:NAME)"
            ) from error
        raise BatchError(f"cannot import {name}: {_explained(error, _file_of(name))}") from error


def _file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _explained(error: BaseException, file: str) -> str:
    """The error, with the line of the user's ``file`` that it comes from."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame.lineno for frame in frames if frame.filename.endswith(file)]
    return f"line {mine[-1]}: {text}" if mine else text
