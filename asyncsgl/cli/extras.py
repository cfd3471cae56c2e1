"""Which extra brings a package that is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

__all__ = ["extra_of"]

_REQUIREMENT = re.compile(r"(?P<package>[\w.-]+).*;.*extra == ['\"](?P<extra>\w+)['\"]")
_COLLECTIONS = ("all", "dev")  # extras that only gather others


def extra_of(module: str) -> str | None:
    """The extra of asyncsgl that installs the package of ``module``, if one does."""
    package = module.partition(".")[0].replace("_", "-").lower()
    try:
        requirements = requires("asyncsgl") or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:
        found = _REQUIREMENT.match(requirement)
        if found is None or found["extra"] in _COLLECTIONS:
            continue
        if found["package"].replace("_", "-").lower() == package:
            return found["extra"]
    return None
