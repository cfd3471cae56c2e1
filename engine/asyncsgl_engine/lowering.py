"""Replaces a model's forward pass by compiled code, where that computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from .attention import AttentionBackend, TritonAttention
from .config import ResolvedConfig
from .forward import Forward, ForwardBySize, ModuleForward
from .kv_cache import KVCache
from .model import LoadedModel
from .native import Library, NativeDecoder, read_weights
from .triton_forward import TritonForward

__all__ = ["lower"]

_LOG = logging.getLogger(__name__)
# Where the processor has matrix tiles (AMX), which the compiled code does not use, PyTorch's
# products overtake it from about this many tokens on.
_TOKENS_FOR_TILES = 128
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}

Probe = Callable[[Forward], torch.Tensor]


def lower(
    model: LoadedModel,
    cache: KVCache,
    attention: AttentionBackend,
    config: ResolvedConfig,
    library: Library | None,
    probe: Probe,
) -> Forward:
    """The fastest forward pass that agrees with the model's own.

    Args:
        model: as transformers loaded it.
        cache: keys and values.
        attention: computes the layers' attention.
        config: the threads to compute with, and the longest sequence.
        library: compiled code for the processor, if there is any.
        probe: runs some tokens through a forward pass and gives all their logits.

    Raises:
        ModelError: the model's own forward pass cannot be used.
    """
    module = ModuleForward(model, cache, attention)
    expected = probe(module)
    # Compiled code does not add up what the ranks have.
    weights = read_weights(model.module) if config.tp_size == 1 else None
    decoder: Forward
    if weights is None:
        return module
    if isinstance(attention, TritonAttention):
        decoder = TritonForward(weights, cache, attention, config.sequence_limit)
    elif library is not None and NativeDecoder.takes(weights):
        decoder = NativeDecoder(library, weights, cache, config.num_threads)
    else:
        return module
    error = _difference(probe(decoder), expected)
    if not error < _TOLERANCE[weights.embedding.dtype]:
        _LOG.warning(
            "%s: the compiled forward pass is off by %.2g of the logits' norm, so it is not used",
            model.facts.architecture,
            error,
        )
        return module
    if isinstance(decoder, NativeDecoder) and _has_matrix_tiles():
        return ForwardBySize(decoder, module, _TOKENS_FOR_TILES)
    return decoder


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference as a share of what is expected, for the median of the rows.

    In bfloat16 single rows may differ widely where the model itself is at the mercy of rounding.
    """
    scale = torch.linalg.vector_norm(expected, dim=-1).clamp_min(1e-30)
    return float((torch.linalg.vector_norm(found - expected, dim=-1) / scale).median())


def _has_matrix_tiles() -> bool:
    # Underscored in PyTorch, so its absence means "no".
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
