"""Models from a Hugging Face hub: configuration, safetensors and tokenizer files, no pickles."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from huggingface_hub import ModelInfo

    from .cache import Progress

__all__ = ["download_snapshot"]

_TIMEOUT = 10.0  # seconds until a hub that does not answer counts as unreachable
_KEPT = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken")


def download_snapshot(
    repo: str,
    revision: str | None,
    *,
    explain: Callable[[Iterable[str]], str],
    instead: str,
    progress: Progress,
) -> Path:
    """Fetch a model into the hub's own cache, or find it there when the hub cannot be reached.

    The hub's usual settings hold (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`).

    Args:
        repo: the model's id.
        revision: branch, tag or commit; None for the main branch.
        explain: file names without safetensors among them → why they cannot be used.
        instead: what the user may ask for otherwise, as a sentence.
        progress: told the share of bytes that have come, from the downloading threads.

    Returns:
        The snapshot's folder.

    Raises:
        ModelError: no such model, no access to it, no safetensors in it, no hub and no copy, or
            no room on the disk.
    """
    progress(f"looking up {repo}", None)
    info = _look_up(repo, revision, instead)
    if info is None:
        return _kept_copy(repo, revision, instead)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = _wanted(sizes)
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ModelError(f"{repo}: {explain(sizes)}")
    stage, total = f"downloading {repo}", sum(sizes[name] for name in wanted)
    return _fetch(repo, revision, wanted, _bar(stage, total, progress))


def _look_up(repo: str, revision: str | None, instead: str) -> ModelInfo | None:
    """What the hub says of a model; None when it does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is no path here and no Hugging Face id. {instead}") from error
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return None
        _refused(repo, revision, instead, error)
    except Exception:  # noqa: BLE001 - the transport's own tree, which changes between versions
        return None


def _refused(repo: str, revision: str | None, instead: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    match error:
        case GatedRepoError():
            problem = (
                "is gated: accept its conditions on its page, then run `hf auth login` or set "
                "HF_TOKEN"
            )
        case NoRevision():
            problem = f"has no revision {revision!r}"
        case RepositoryNotFoundError():
            problem = f"is not on the hub, or is private (then set HF_TOKEN). {instead}"
        case _:
            problem = f"was refused by the hub: {error}"
    raise ModelError(f"model {repo!r} {problem}") from error


def _kept_copy(repo: str, revision: str | None, instead: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=[f"*{ending}" for ending in _KEPT],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except OSError as error:
        reason = (
            "offline mode is on (HF_HUB_OFFLINE)"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} does not answer"
        )
        raise ModelError(
            f"cannot fetch model {repo!r}: {reason}, and {constants.HF_HUB_CACHE} holds no whole "
            f"copy of it. Check the network (or HF_ENDPOINT, for a mirror). {instead}"
        ) from error
    return Path(folder)


def _wanted(names: Iterable[str]) -> list[str]:
    """The files of the top folder that loading takes."""
    kept = [name for name in names if "/" not in name and name.endswith(_KEPT)]
    sharded = [name for name in kept if not name.startswith("consolidated")]
    has_weights = any(name.endswith(".safetensors") for name in sharded)
    return sharded if has_weights else kept  # `consolidated.*` are the same weights once more


def _fetch(repo: str, revision: str | None, wanted: list[str], bar: type[Any]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,  # by name, so that the copy is found by name without the hub
            allow_patterns=wanted,
            etag_timeout=_TIMEOUT,
            tqdm_class=bar,
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"the disk of {constants.HF_HUB_CACHE} is full: free some space, or set HF_HOME "
                "to a folder on another disk, and try again"
            ) from error
        raise ModelError(
            f"the download of {repo} broke off ({type(error).__name__}: {error}); try again, "
            "what has come is kept"
        ) from error
    return Path(folder)


def _bar(stage: str, total_bytes: int, progress: Progress) -> type[Any]:
    """A progress bar class that draws nothing and passes the bytes on."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no watching thread

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = str(kwargs.get("desc", "")).startswith("Reconstructing")
            quiet = {**kwargs, "file": io.StringIO(), "disable": False}
            super().__init__(*args, **quiet)  # type: ignore[no-untyped-call]

        def display(self, *_: Any, **__: Any) -> None:
            if self.counts_bytes:
                progress(stage, min(self.n / total_bytes, 1.0) if total_bytes else None)

    return Bar
