"""A forward pass in C for processors: built on the machine, checked against transformers' own."""

from __future__ import annotations

from .attention import NativeAttention
from .build import Library, build_library
from .decoder import NativeDecoder
from .sampling import NativeSampling
from .weights import DecoderWeights, read_weights

__all__ = [
    "DecoderWeights",
    "Library",
    "NativeAttention",
    "NativeDecoder",
    "NativeSampling",
    "build_library",
    "read_weights",
]
