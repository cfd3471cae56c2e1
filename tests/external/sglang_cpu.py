"""Starts SGLang's own server, unchanged, on a processor without its compiled kernels.

SGLang's PyTorch code does all the work of a plain Llama. Its kernels are only imported: each
stands here as a name that raises when it is called. It takes the flags of
``sglang.launch_server``; SGLang's own processes begin with this file too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import runpy
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

KERNELS = "sgl_kernel"
VISION = "torchvision"
"""Built for GPUs, it comes without its operators, whose shapes it declares all the same."""

OPERATORS = ("nms", "qnms")


class Kernel:
    """A kernel, or a name inside one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kernel(f"{self._name}.{name}")

    def __call__(self, *_: object, **__: object) -> None:
        raise NotImplementedError(f"{self._name} is a compiled kernel, which is not here")


class Kernels(types.ModuleType):
    """A module of kernels, with any name that is asked for."""

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kernel(f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of kernels."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != KERNELS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
vision: Any = torch.library.Library(VISION, "DEF")  # type: ignore[no-untyped-call]
for operator in OPERATORS:
    vision.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.meta_path.append(Finder())

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
