"""Every module's ``__all__``: sorted, without repeats, and exactly what the module offers."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import asyncsgl

PYPROJECT = tomllib.loads(
    (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
)


def public_modules() -> list[str]:
    """The package and its modules, those left out whose import starts a program."""
    found = pkgutil.walk_packages(asyncsgl.__path__, "asyncsgl.")
    return ["asyncsgl", *(module.name for module in found if not module.name.endswith("__main__"))]


def by_kind(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions; by alphabet within each."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


@pytest.mark.parametrize("name", public_modules())
def test_all_is_sorted_and_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    exported: list[str] = list(getattr(module, "__all__", ()))
    assert exported == sorted(set(exported), key=by_kind)
    assert [item for item in exported if not hasattr(module, item)] == []


def test_the_package_offers_what_all_says() -> None:
    public = {
        name
        for name, value in vars(asyncsgl).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("asyncsgl")
    }
    assert public <= set(asyncsgl.__all__)
    assert set(asyncsgl.__all__) <= set(dir(asyncsgl))


def test_an_unknown_name_is_an_attribute_error() -> None:
    name = "no_such_name"
    with pytest.raises(AttributeError, match=name):
        getattr(asyncsgl, name)


def test_the_dev_extra_holds_every_tool() -> None:
    groups: dict[str, list[object]] = PYPROJECT["dependency-groups"]
    tools = {line for lines in groups.values() for line in lines if isinstance(line, str)}
    assert set(PYPROJECT["project"]["optional-dependencies"]["dev"]) == tools


def test_the_all_extra_holds_every_other() -> None:
    extras: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
    (line,) = extras["all"]
    assert Requirement(line).extras == set(extras) - {"all", "dev"}


def test_every_direct_dependency_has_a_tested_version() -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for path in Path(__file__).parent.parent.glob("constraints*.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    lines = [
        *PYPROJECT["project"]["dependencies"],
        *(
            line
            for extra in PYPROJECT["project"]["optional-dependencies"].values()
            for line in extra
        ),
    ]
    names = {Requirement(line).name.lower().replace("_", "-") for line in lines}
    assert names - pinned == {"asyncsgl"}
