"""Remembers how a model is run without transformers, from one start to the next.

The first start of a model loads it with transformers and tries the compiled code against it. What
it learnt then is kept in the cache folder, for as long as the model's files, the compiled code and
the libraries stay the same. Later starts read the weights themselves, and try the compiled code
against the logits that transformers gave for the same tokens: what is wrong with the files, the
code or the memory of it shows there, and the model is loaded with transformers again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
import torch
from safetensors import SafetensorError

from .hub.notes import Notes, Subject, identify
from .lowering import Proof
from .native import plan_weights
from .recipe import PreparedModel, Recipe
from .tokenizer import KeptTokenizer, Tokenizer
from .weight_files import WeightFiles

if TYPE_CHECKING:
    from .config import DTypeName, ModelFacts
    from .model import LoadedModel
    from .native import Library

__all__ = ["UNREADABLE", "Memory", "Recalled"]

Shapes = Mapping[str, tuple[int, ...]]

UNREADABLE = (KeyError, OSError, SafetensorError, ValueError)
"""What reading remembered weights raises where they are not what they were."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """What is needed to run a model.

    Args:
        model: its weights are read as they are asked for.
        tokenizer: the model's.
    """

    model: PreparedModel
    tokenizer: Tokenizer


class Memory:
    """Of one model in one precision.

    Args:
        notes: where it is kept.
        model: the model's folder.
        tokenizer: the tokenizer's folder.
        dtype: of weights and arithmetic.
        library: computes the forward pass.
    """

    def __init__(
        self, notes: Notes, model: Path, tokenizer: Path, dtype: DTypeName, library: Library
    ) -> None:
        self._notes = notes
        self._model, self._tokenizer = model, tokenizer
        self._dtype: torch.dtype = getattr(torch, dtype)
        libraries = _libraries()
        code = {"dtype": dtype, "library": library.name}
        self._recipe = _subject(dtype, model, {**libraries, **code})
        self._words = _subject("tokenizer", tokenizer, libraries)

    def recall(self, progress: Callable[[float], None]) -> Recalled | None:
        """The model as it was learnt; None where it was not, or is another one now.

        Args:
            progress: called with the share of the weights that have been read.
        """
        recipe, words = self._notes.read(self._recipe), self._notes.read(self._words)
        if recipe is None or words is None:
            return None
        try:
            files = WeightFiles(self._model)
            model = Recipe.from_json(recipe).prepare(files, self._dtype, progress)
            tokenizer = Tokenizer(KeptTokenizer(self._tokenizer, words))
        except UNREADABLE:
            self.forget()
            return None
        return Recalled(model, tokenizer)

    def examine(self, model: LoadedModel) -> Shapes | None:
        """The shapes of a model's weights, where it can be remembered; None where not.

        It cannot where the files have the weights under other names than the model, or in another
        form: each is compared bit by bit.
        """
        plan = plan_weights(model.module)
        if plan is None or model.vision is not None:
            return None
        shapes = {}
        try:
            files = WeightFiles(self._model)
            for name in sorted(plan.names):
                used = model.module.get_parameter(name)
                if not torch.equal(files.read(name).to(self._dtype), used):
                    return None
                shapes[name] = tuple(used.shape)
        except (*UNREADABLE, RuntimeError):
            return None
        return shapes

    def learn(self, facts: ModelFacts, tokenizer: Tokenizer, shapes: Shapes, proof: Proof) -> None:
        """Remember a model that transformers loaded.

        Args:
            facts: of the model.
            tokenizer: the model's.
            shapes: what `examine` gave.
            proof: that it can be run without transformers.
        """
        words = tokenizer.keep()
        if words is not None:
            recipe = Recipe(facts, proof.plan, shapes, proof.sample)
            self._notes.write(self._words, words)
            self._notes.write(self._recipe, recipe.as_json())

    def forget(self) -> None:
        """Drop what was learnt."""
        self._notes.erase(self._recipe)


def _subject(kind: str, folder: Path, more: Mapping[str, str]) -> Subject:
    place = folder.resolve()
    name = f"{sha256(str(place).encode()).hexdigest()[:24]}-{kind}"
    return Subject(name, {"files": identify(place), **more})


def _libraries() -> dict[str, str]:
    """What transformers' forward pass, and reading without it, depend on."""
    found = {"torch": torch.__version__, "tokenizers": tokenizers.__version__}
    for library in ("asyncsgl", "transformers"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "unknown"
    return found
