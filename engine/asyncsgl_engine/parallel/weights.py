"""Builds one rank's part of a model, reading from the disk only what that rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..config import ModelFacts
from ..errors import ConfigError, ModelError
from ..model import LoadedModel, load_model, reading, wrap_model
from ..vision import check_eyes, has_eyes
from ..weight_files import weight_files
from .group import Group
from .shards import Cut, Division, divide

__all__ = ["Blueprint", "draw"]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model without its weights, and how it is shared out.

    Args:
        path: the model's folder.
        module: its large parameters are on the `meta` device.
        dtype: of the parameters.
        division: among the ranks.
    """

    path: Path
    module: PreTrainedModel
    dtype: torch.dtype
    division: Division

    @property
    def facts(self) -> ModelFacts:
        """Of the whole model."""
        return self.division.whole

    def build(self, group: Group, device: torch.device) -> LoadedModel:
        """One rank's part of the model; the blueprint cannot be used again.

        Where the files name the parameters otherwise than the model does, all of the model is
        read and then cut, for which there must be memory.

        Args:
            group: the ranks.
            device: where the rank's part goes.

        Raises:
            ModelError: the weights cannot be read.
        """
        module = self.module
        twins = _twins(module)
        with reading(self.path), ExitStack() as open_files:
            files = _Files(self.path, open_files)
            names = {
                name: source for name in twins if (source := files.name_of(twins[name])) is not None
            }
            if len(names) == len(twins):
                files.check(names, module)
                cuts = self.division.apply(module, group)
                _fill(module, cuts, files, names, device)
                nn.Module.to(module, device)
                return LoadedModel(module, self.division.facts)
        whole = load_model(self.path, self.dtype, torch.device("cpu")).module
        self.division.apply(whole, group)
        nn.Module.to(whole, device)
        return LoadedModel(whole, self.division.facts)


def draw(path: Path, dtype: torch.dtype, size: int) -> Blueprint:
    """Make a model without its weights and see how it is shared out among `size` ranks.

    Raises:
        ModelError: the folder has no model, or one of a kind that the engine cannot run.
        ConfigError: it cannot be shared out so.
    """
    with reading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        check_eyes(config)
        if has_eyes(config):
            raise ConfigError(
                f"tp_size: models of the kind {config.model_type!r} read images, which several "
                "processes cannot do; use tp_size=1"
            )
        with _Weightless():
            module: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=False
            )
    wrapped = wrap_model(module)
    return Blueprint(path, module, dtype, divide(module, wrapped.facts, size))


class _Weightless(TorchFunctionMode):
    """What layers reserve without a value, their weights, gets no memory.

    Buffers are computed, by other functions than `torch.empty`, and so keep their values. The
    mode is this thread's alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Files:
    """The tensors of a model folder, by their names."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for file in weight_files(path):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def name_of(self, names: tuple[str, ...]) -> str | None:
        """The first of these names that there is a tensor of."""
        return next((name for name in names if name in self._files), None)

    def check(self, names: Mapping[str, str], module: nn.Module) -> None:
        """See that the tensors have the shapes of a whole model's parameters.

        Raises:
            ModelError: one has another.
        """
        for name, parameter in module.named_parameters(remove_duplicate=False):
            source = names[name]
            shape = tuple(self._files[source].get_slice(source).get_shape())
            if shape != tuple(parameter.shape):
                raise ModelError(
                    f"{source} has the shape {shape} in the files and {tuple(parameter.shape)} "
                    "in the model"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, cut: Cut | None) -> torch.Tensor:
        """A tensor, or the part of it that is wanted."""
        if cut is None:
            whole: torch.Tensor = self._files[name].get_tensor(name)
            return whole
        found = self._files[name].get_slice(name)
        return cut.of(tuple(found.get_shape()), found.__getitem__)


def _twins(module: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """For each parameter its name and those of the parameters that are the same."""
    by_id: dict[int, list[str]] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        by_id.setdefault(id(parameter), []).append(name)
    return {name: (name, *by_id[id(parameter)]) for name, parameter in named}


def _fill(
    module: nn.Module,
    cuts: Mapping[str, Cut],
    files: _Files,
    names: Mapping[str, str],
    device: torch.device,
) -> None:
    """Give the parameters their values; those that are the same share them."""
    made: dict[tuple[str, Cut | None], nn.Parameter] = {}
    for name, empty in list(module.named_parameters(remove_duplicate=False)):
        source, cut = names[name], cuts.get(name)
        if (source, cut) not in made:
            value = files.read(source, cut).to(device, empty.dtype).contiguous()
            made[source, cut] = nn.Parameter(value, requires_grad=False)
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, made[source, cut])
    for name, buffer in module.named_buffers():
        if name in files:
            buffer.copy_(files.read(name, None))
