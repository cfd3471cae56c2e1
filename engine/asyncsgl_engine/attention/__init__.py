"""Attention over pages: one entry that transformers calls, and what computes it."""

from __future__ import annotations

from .base import AttentionBackend, LayerCall, StepContext
from .interface import IMPLEMENTATION, register
from .native import NativeAttention, build_native
from .torch_cpu import TorchAttention
from .triton_attention import TritonAttention, build_triton

__all__ = [
    "IMPLEMENTATION",
    "AttentionBackend",
    "LayerCall",
    "NativeAttention",
    "StepContext",
    "TorchAttention",
    "TritonAttention",
    "build_native",
    "build_triton",
    "register",
]
