"""Replaces a model's forward pass by compiled code, where that computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .attention import AttentionBackend, TritonAttention
from .config import ResolvedConfig
from .forward import Forward, ForwardBySize, ModuleForward
from .kv_cache import KVCache
from .layered_forward import LayeredForward
from .native import DecoderPlan, DecoderWeights, Library, NativeDecoder, plan_weights
from .recipe import PreparedModel, sample_of
from .triton_forward import TritonForward

if TYPE_CHECKING:
    from .model import LoadedModel

__all__ = ["Lowered", "NotAsBefore", "Proof", "lower"]

_LOG = logging.getLogger(__name__)
# Where the processor has matrix tiles (AMX), which the compiled code does not use, PyTorch's
# products overtake it from about this many tokens on.
_TOKENS_FOR_TILES = 128
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}

Probe = Callable[[Forward], torch.Tensor]


class NotAsBefore(Exception):
    """A prepared model does not compute what transformers made of it once."""


@dataclass(frozen=True, slots=True)
class Proof:
    """That compiled code computes what transformers' own module does.

    Args:
        plan: what it was told of the model.
        sample: of the module's logits for the trial's tokens.
    """

    plan: DecoderPlan
    sample: torch.Tensor


@dataclass(frozen=True, slots=True)
class Lowered:
    """A forward pass.

    Args:
        forward: computes it.
        proof: why it may, where that is not transformers' own module and nothing else.
    """

    forward: Forward
    proof: Proof | None = None


def lower(
    model: LoadedModel | PreparedModel,
    cache: KVCache,
    attention: AttentionBackend,
    config: ResolvedConfig,
    library: Library | None,
    probe: Probe,
    tiles: bool | None = None,
) -> Lowered:
    """The fastest forward pass that agrees with the model's own.

    Args:
        model: as transformers loaded it, or prepared.
        cache: keys and values.
        attention: computes the layers' attention.
        config: the threads to compute with, and the longest sequence.
        library: compiled code for the processor, if there is any.
        probe: runs some tokens through a forward pass and gives all their logits.
        tiles: whether PyTorch's products overtake the compiled code's in large steps; by default
            where the processor has matrix tiles.

    Raises:
        ModelError: the model's own forward pass cannot be used.
        NotAsBefore: the model is prepared, and its logits are other ones now.
    """
    tiles = _has_matrix_tiles() if tiles is None else tiles
    if isinstance(model, PreparedModel):
        weights = model.weights
        if tiles:  # its large steps read the layers as they are
            weights = replace(weights, layers=[layer.copied() for layer in weights.layers])
        forward = _compiled(weights, cache, attention, config, library, tiles)
        if forward is None:
            raise NotAsBefore("there is no compiled code for the model any more")
        error = _error(forward, lambda part: sample_of(probe(part)), model.sample)
        if not error < _TOLERANCE[weights.embedding.dtype]:
            raise NotAsBefore(f"its logits are off by {error:.2g} of their norm")
        return Lowered(forward)
    module = ModuleForward(model, cache, attention)
    expected = probe(module)
    # Compiled code does not add up what the ranks have.
    plan = plan_weights(model.module) if config.tp_size == 1 else None
    if plan is None:
        return Lowered(module)
    weights = plan.read(model.module.get_parameter)
    forward = _compiled(weights, cache, attention, config, library, tiles)
    if forward is None:
        return Lowered(module)
    error = _error(forward, probe, expected)
    if not error < _TOLERANCE[weights.embedding.dtype]:
        _LOG.warning(
            "%s: the compiled forward pass is off by %.2g of the logits' norm, so it is not used",
            model.facts.architecture,
            error,
        )
        return Lowered(module)
    return Lowered(forward, Proof(plan, sample_of(expected)))


def _compiled(
    weights: DecoderWeights,
    cache: KVCache,
    attention: AttentionBackend,
    config: ResolvedConfig,
    library: Library | None,
    tiles: bool,
) -> Forward | None:
    """Compiled code for the device, where there is any for a model of these sizes."""
    if isinstance(attention, TritonAttention):
        return TritonForward(weights, cache, attention, config.sequence_limit)
    if library is None or not NativeDecoder.takes(weights):
        return None
    decoder = NativeDecoder(library, weights, cache, config.num_threads)
    if not tiles:
        return decoder
    return ForwardBySize(
        decoder, LayeredForward(weights, cache, attention), tokens=_TOKENS_FOR_TILES
    )


def _error(forward: Forward, probe: Probe, expected: torch.Tensor) -> float:
    """How far logits are from what is expected; see `_difference`.

    Args:
        forward: gives them. Each part of it is tried, if it has several.
        probe: runs some tokens through a forward pass.
        expected: for these tokens, or for more or less of them.
    """
    parts = forward.parts if isinstance(forward, ForwardBySize) else (forward,)
    errors = []
    for part in parts:
        found = probe(part)
        rows = min(len(found), len(expected))
        errors.append(_difference(found[:rows], expected[:rows]))
    return max(errors)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference as a share of what is expected, for the median of the rows.

    In bfloat16 single rows may differ widely where the model itself is at the mercy of rounding.
    """
    scale = torch.linalg.vector_norm(expected, dim=-1).clamp_min(1e-30)
    return float((torch.linalg.vector_norm(found - expected, dim=-1) / scale).median())


def _has_matrix_tiles() -> bool:
    # Underscored in PyTorch, so its absence means "no".
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
