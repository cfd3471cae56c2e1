"""Attention over pages: one entry that transformers calls, and what computes it."""

from __future__ import annotations

from .base import AttentionBackend, LayerCall, StepContext
from .torch_cpu import TorchAttention
from .triton_attention import TritonAttention, build_triton

__all__ = [
    "AttentionBackend",
    "LayerCall",
    "StepContext",
    "TorchAttention",
    "TritonAttention",
    "build_triton",
]
