"""Which part of which parameter a rank holds, by the plan that a model declares.

The division is that of Megatron-LM (Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion
Parameter Language Models Using Model Parallelism", section 3): the first of two products is cut
by columns and the second by rows, so that a layer needs one sum after its attention and one after
its feed-forward part. transformers' models declare it by module: `base_model_tp_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import ModelFacts
from ..errors import ConfigError
from .group import Group

__all__ = ["Cut", "Division", "divide"]

_COLUMNS = {"colwise"}
_GATHERED = {"colwise_gather_output", "colwise_rep"}
_ROWS = {"rowwise"}
_SPLIT_ROWS = {"rowwise_split_input", "rowwise_rep"}
_VOCABULARY = {"embedding_rowwise"}
_WHOLE = {"replicate", "replicated_with_grad_allreduce"}
_SUMMED = {"moe_tp_experts", "all_reduce"}
_PACKED = {"packed_colwise"}
_OF_LINEARS = _COLUMNS | _GATHERED | _ROWS | _SPLIT_ROWS
_OF_PARAMETERS = _ROWS | _PACKED | _WHOLE
_KEYS = {"k_proj", "qkv_proj", "query_key_value"}
_KEYS_AND_VALUES = {"k_proj", "v_proj"}


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a parameter that a rank holds.

    Args:
        dim: the dimension that is cut.
        spans: begin and end of the parts along it, which lie side by side in the rank's own.
    """

    dim: int
    spans: tuple[tuple[int, int], ...]

    def of(self, shape: tuple[int, ...], read: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The part of a tensor of this shape; `read` is given an index, a slice a dimension."""
        before = (slice(None),) * (self.dim % len(shape))
        parts = [read((*before, slice(begin, end))) for begin, end in self.spans]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class Division:
    """How a model is shared out.

    Args:
        styles: what happens to which module or parameter, by its name, in transformers' words.
        facts: what one rank holds.
        whole: of the model.
        size: ranks.
    """

    styles: Mapping[str, str]
    facts: ModelFacts
    whole: ModelFacts
    size: int

    def apply(self, module: PreTrainedModel, group: Group) -> dict[str, Cut]:
        """Cut the parameters of a model down to a rank's, and connect it to the others.

        Args:
            module: changed in place; its parameters may be on the `meta` device.
            group: the ranks; as many as the division is for.

        Returns:
            What was cut, by the names of the parameters.
        """
        head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
        cuts = dict(self._cuts(module, group, head))
        for name, cut in cuts.items():
            owner, _, own = name.rpartition(".")
            parent = module.get_submodule(owner)
            whole = getattr(parent, own)
            part = cut.of(tuple(whole.shape), whole.__getitem__).clone()
            setattr(parent, own, nn.Parameter(part, requires_grad=False))
        return cuts

    def _cuts(
        self, module: PreTrainedModel, group: Group, head: nn.Module
    ) -> Iterator[tuple[str, Cut]]:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, style in self.styles.items():
            if name in parameters:
                yield from _cut_parameter(name, parameters[name], style, group)
            elif style in _COLUMNS | _GATHERED:
                linear = _linear(module, name)
                yield from self._cut_columns(name, linear, group, style in _COLUMNS)
                if style in _GATHERED:
                    linear.register_forward_hook(_gathering(group, linear is head, linear))
            elif style in _ROWS | _SPLIT_ROWS:
                linear = _linear(module, name)
                yield from _cut_rows(name, linear, group, style in _SPLIT_ROWS)
            elif style in _VOCABULARY:
                yield from _cut_vocabulary(name, module.get_submodule(name), group)
            elif style in _SUMMED:
                module.get_submodule(name).register_forward_hook(_summing(group))

    def _cut_columns(
        self, name: str, linear: nn.Linear, group: Group, by_heads: bool
    ) -> Iterator[tuple[str, Cut]]:
        kind = name.rpartition(".")[2]
        if by_heads and kind in _KEYS_AND_VALUES and self.whole.num_kv_heads < self.size:
            head = group.rank * self.whole.num_kv_heads // self.size
            begin, end = head * self.whole.head_dim, (head + 1) * self.whole.head_dim
        else:
            begin, end = group.span(linear.out_features)
        yield f"{name}.weight", Cut(0, ((begin, end),))
        if _has_bias(linear):
            yield f"{name}.bias", Cut(0, ((begin, end),))


def divide(module: PreTrainedModel, whole: ModelFacts, size: int) -> Division:
    """Find how a model is shared out among `size` ranks; nothing is changed.

    Args:
        module: its parameters may be on the `meta` device.
        whole: what the engine knows of it.
        size: ranks.

    Raises:
        ConfigError: the model declares no plan, or one that does not fit.
    """
    plan: dict[str, str] = module.tp_plan or {}
    modules = dict(module.named_modules())
    styles = {
        name: plan[_wildcard(name)]
        for name in chain(modules, dict(module.named_parameters(remove_duplicate=False)))
        if _wildcard(name) in plan
    }
    if not (_ROWS | _SPLIT_ROWS) & set(styles.values()):
        raise ConfigError(
            f"tp_size: {whole.architecture} declares no plan for tensor parallelism; use tp_size=1"
        )
    for name, style in styles.items():
        _check_style(whole.architecture, name, style, modules.get(name))
    by_heads = any(
        name.rpartition(".")[2] in _KEYS and style in _COLUMNS for name, style in styles.items()
    )
    facts = whole.shard(size) if by_heads else whole
    _check_keys(styles, whole, size)
    return Division(styles, facts, whole, size)


def _check_style(architecture: str, name: str, style: str, module: nn.Module | None) -> None:
    if module is None:
        known = style in _OF_PARAMETERS
    elif style in _OF_LINEARS:
        known = isinstance(module, nn.Linear)
    else:
        known = style in _WHOLE | _SUMMED or (
            style in _VOCABULARY and isinstance(module, nn.Embedding)
        )
    if not known:
        kind = "parameter" if module is None else type(module).__name__
        raise ConfigError(
            f"tp_size: {architecture} wants its {kind} {name} shared as {style!r}, which this "
            "engine cannot do; use tp_size=1"
        )


def _check_keys(styles: Mapping[str, str], whole: ModelFacts, size: int) -> None:
    fused = [
        name
        for name, style in styles.items()
        if style in _COLUMNS and name.rpartition(".")[2] in _KEYS - _KEYS_AND_VALUES
    ]
    if fused and whole.num_kv_heads % size:
        raise ConfigError(
            f"tp_size: {size} does not divide the {whole.num_kv_heads} key/value heads of "
            f"{whole.architecture}, whose {fused[0]} cannot be held by several ranks"
        )


def _wildcard(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _has_bias(linear: nn.Linear) -> bool:
    return "bias" in dict(linear.named_parameters(recurse=False))


def _cut_parameter(
    name: str, parameter: torch.Tensor, style: str, group: Group
) -> Iterator[tuple[str, Cut]]:
    """A parameter with a rule of its own, as experts' are: (experts, rows, columns)."""
    if style in _ROWS:
        yield name, Cut(-1, (group.span(parameter.shape[-1]),))
    elif style in _PACKED:  # two matrices, one below the other
        half = parameter.shape[-2] // 2
        begin, end = group.span(half)
        yield name, Cut(-2, ((begin, end), (half + begin, half + end)))


def _cut_rows(name: str, linear: nn.Linear, group: Group, split: bool) -> Iterator[tuple[str, Cut]]:
    begin, end = group.span(linear.in_features)
    yield f"{name}.weight", Cut(1, ((begin, end),))
    if group.rank:
        linear.register_parameter("bias", None)  # rank 0 adds it, once

    def take_part(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0][..., begin:end], *args[1:]

    if split:
        linear.register_forward_pre_hook(take_part)
    linear.register_forward_hook(_summing(group))


def _cut_vocabulary(name: str, embedding: nn.Module, group: Group) -> Iterator[tuple[str, Cut]]:
    assert isinstance(embedding, nn.Embedding)
    begin, end = group.span(embedding.num_embeddings)
    yield f"{name}.weight", Cut(0, ((begin, end),))
    embedding.padding_idx = None  # it matters to gradients only
    outside = torch.empty(0)

    def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal outside
        ids = args[0]
        outside = (ids < begin) | (ids >= end)
        return (ids - begin).masked_fill(outside, 0), *args[1:]

    def add(_: nn.Module, _args: object, found: torch.Tensor) -> torch.Tensor:
        rows = found.masked_fill(outside[..., None], 0)
        group.all_reduce(rows)
        return rows

    embedding.register_forward_pre_hook(look)
    embedding.register_forward_hook(add)


def _summing(group: Group) -> Callable[..., torch.Tensor]:
    def add(_: nn.Module, _args: object, part: torch.Tensor) -> torch.Tensor:
        part = part.contiguous()
        group.all_reduce(part)
        return part

    return add


def _gathering(group: Group, is_head: bool, linear: nn.Linear) -> Callable[..., Any]:
    total = linear.out_features

    def join(_: nn.Module, _args: object, part: torch.Tensor) -> torch.Tensor:
        return group.gather_columns(part, total, root_only=is_head)  # only rank 0 draws tokens

    return join
