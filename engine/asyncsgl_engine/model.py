"""Loads a transformers model so that its attention runs over the engine's pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .attention import StepContext
from .attention.interface import IMPLEMENTATION, register
from .config import ModelFacts
from .errors import EngineError, ModelError
from .vision import VisionTower, check_eyes, has_eyes, load_vision

__all__ = ["LoadedModel", "load_model", "reading", "wrap_model"]

_reading_lock = Lock()
_SEEN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in evaluation mode.

    Args:
        module: transformers' own module.
        facts: what the engine plans with.
        vision: what reads images, in a model that does.
    """

    module: PreTrainedModel
    facts: ModelFacts
    vision: VisionTower | None = None

    def logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        rows: torch.Tensor,
        context: StepContext,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one packed forward pass.

        Args:
            input_ids: (1, T).
            position_ids: (1, T).
            rows: the tokens whose logits are wanted, (R,).
            context: where attention reads and writes.
            embeddings: of the tokens, instead of `input_ids`, (T, hidden).

        Returns:
            (R, vocab).
        """
        output: Any = self.module(
            input_ids=input_ids if embeddings is None else None,
            inputs_embeds=None if embeddings is None else embeddings[None],
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=rows,
            paged=context,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Load a model folder.

    Args:
        path: folder with config.json and safetensors.
        dtype: of weights and arithmetic.
        device: where it goes.

    Raises:
        ModelError: it cannot be loaded, or is of a kind the engine cannot run.
    """
    with reading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        _check_kind(config)
        register()
        check_eyes(config)
        if has_eyes(config):
            return _with_eyes(*load_vision(path, dtype), device)
        module = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    torch.nn.Module.to(module, device)
    return wrap_model(module)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read a model from a folder, without transformers' progress bars; one thread at a time.

    While transformers reads a model, its classes are changed for the whole process; two threads
    that undo that out of turn would leave them so.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with _reading_lock, _quiet():
            yield
    except EngineError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"the model in {path} could not be loaded ({type(error).__name__}: {error})"
        ) from error


def _with_eyes(language: PreTrainedModel, vision: VisionTower, device: torch.device) -> LoadedModel:
    torch.nn.Module.to(vision.module, device)
    model = wrap_model(language)
    facts = replace(
        model.facts,
        architecture=type(vision.module).__name__,
        model_type=str(vision.module.config.model_type),
    )
    return replace(model, facts=facts, vision=vision)


def wrap_model(module: PreTrainedModel) -> LoadedModel:
    """Make a model that is in memory ready for the engine; it is changed in place.

    Raises:
        ModelError: it is of a kind the engine cannot run.
    """
    config = module.config.get_text_config(decoder=True)
    _check_kind(config)
    register()
    try:
        module.set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise ModelError(
            f"{type(module).__name__} does not let its attention be replaced: {error}"
        ) from error
    module.train(mode=False)
    heads = int(config.num_attention_heads)
    facts = ModelFacts(
        architecture=type(module).__name__,
        num_layers=int(config.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab_size=_vocab_size(module),
        context_length=int(getattr(config, "max_position_embeddings", None) or 2048),
        weight_dtype=str(module.dtype).removeprefix("torch."),
        model_type=str(module.config.model_type),
    )
    return LoadedModel(module, facts)


def _vocab_size(module: PreTrainedModel) -> int:
    head: torch.nn.Linear = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return int(head.weight.shape[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars: the caller shows progress its own way."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_kind(config: PreTrainedConfig) -> None:
    text = config.get_text_config(decoder=True)
    name = (config.architectures or [type(config).__name__])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; the engine runs decoder-only models")
    other = set(getattr(text, "layer_types", None) or ()) - _SEEN_LAYERS
    if other:
        raise ModelError(
            f"{name} has layers of kinds {sorted(other)}; the engine runs full and sliding "
            "attention"
        )
