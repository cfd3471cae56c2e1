"""What can be asked of the server or engine behind a backend."""

from __future__ import annotations

from ..backends.base import Backend
from .defaults import choose_backend
from .prefix import prefix_request

__all__ = ["cache_prefix", "flush_cache", "get_server_info", "start_profile", "stop_profile"]


async def get_server_info(backend: Backend | None = None) -> dict[str, object]:
    """The settings and the state of the server or engine, by its own names.

    Args:
        backend: the default one unless given.

    Raises:
        UnsupportedFeature: the backend has no server or engine to ask.
        BackendError: the server refused, failed, or could not be reached.
        UsageError: there is no backend.
    """
    return await choose_backend(backend).get_server_info()


async def flush_cache(backend: Backend | None = None, *, wait: bool = False) -> bool:
    """Empty the prefix cache; False, and nothing done, while requests run.

    Args:
        backend: the default one unless given.
        wait: wait until no request runs, then empty it.

    Raises:
        As :func:`get_server_info`.
    """
    return await choose_backend(backend).flush_cache(wait=wait)


async def start_profile(
    backend: Backend | None = None,
    *,
    output_dir: str | None = None,
    num_steps: int | None = None,
) -> str:
    """Begin to record what the model's processors do; what the server or engine says to it.

    Args:
        backend: the default one unless given.
        output_dir: the folder for the traces, on the machine that runs the model.
        num_steps: after how many steps to stop without being told.

    Raises:
        As :func:`get_server_info`.
    """
    chosen = choose_backend(backend)
    return await chosen.start_profile(output_dir=output_dir, num_steps=num_steps)


async def stop_profile(backend: Backend | None = None) -> str:
    """End what :func:`start_profile` began; what the server or engine says to it.

    Args:
        backend: the default one unless given.

    Raises:
        As :func:`get_server_info`.
    """
    return await choose_backend(backend).stop_profile()


async def cache_prefix(text: str, backend: Backend | None = None) -> None:
    """Compute ``text`` ahead, so that prompts beginning with it need not.

    Args:
        text: raw text, as :meth:`asyncsgl.State.text` gives it.
        backend: the default one unless given.

    Raises:
        As :func:`get_server_info`.
    """
    await choose_backend(backend).cache_prefix(prefix_request(text))
