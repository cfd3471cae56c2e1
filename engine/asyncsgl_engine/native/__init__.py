"""A forward pass in C for processors: built on the machine, checked against transformers' own."""

from __future__ import annotations

from .attention import NativeAttention
from .build import Library, build_library
from .decoder import NativeDecoder
from .planning import plan_weights, read_weights
from .sampling import NativeSampling
from .weights import DecoderPlan, DecoderWeights

__all__ = [
    "DecoderPlan",
    "DecoderWeights",
    "Library",
    "NativeAttention",
    "NativeDecoder",
    "NativeSampling",
    "build_library",
    "plan_weights",
    "read_weights",
]
