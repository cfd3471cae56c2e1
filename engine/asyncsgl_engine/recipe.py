"""How a model is run without transformers, as learnt from a start with it."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from .config import ModelFacts
from .native.weights import DecoderPlan, DecoderWeights, LayerPlan
from .weight_files import WeightFiles

__all__ = ["PreparedModel", "Recipe", "sample_of"]

_COLUMNS = 256
_MOST_TOLD = 0.99  # what comes after the weights is a part of loading too


def sample_of(logits: torch.Tensor) -> torch.Tensor:
    """Some columns from all over the vocabulary.

    Args:
        logits: (tokens, vocab).

    Returns:
        (tokens, at most 256).
    """
    return logits[:, :: -(-logits.shape[1] // _COLUMNS)]


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model that is run without transformers.

    Args:
        facts: what the engine plans with.
        weights: read from the files as they are asked for.
        sample: of the logits that transformers' own forward pass gave for the trial's tokens.
        size: bytes of the weights.
    """

    facts: ModelFacts
    weights: DecoderWeights
    sample: torch.Tensor
    size: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that transformers knew of a model but its weights, and what it made of some tokens.

    Args:
        facts: what the engine plans with.
        plan: names of the weights, and the numbers between them.
        shapes: of the weights, by name.
        sample: float32 (tokens, columns), see `PreparedModel`.
    """

    facts: ModelFacts
    plan: DecoderPlan
    shapes: Mapping[str, tuple[int, ...]]
    sample: torch.Tensor

    def prepare(
        self, files: WeightFiles, dtype: torch.dtype, progress: Callable[[float], None]
    ) -> PreparedModel:
        """The model, its weights still in the files.

        Args:
            files: of the model's folder.
            dtype: of weights and arithmetic.
            progress: called with the share of the weights that have been read.

        Raises:
            ValueError: a weight has not the shape that it had. Also raised later, by what reads
                the layers.
            KeyError: a weight is not there any more.
        """
        done, total = 0, sum(map(_count, self.shapes.values()))

        def read(name: str) -> torch.Tensor:
            nonlocal done
            found = files.read(name)
            if tuple(found.shape) != self.shapes[name]:
                raise ValueError(f"{name} has the shape {tuple(found.shape)}")
            done += found.numel()
            progress(min(_MOST_TOLD, done / total))
            return found.to(dtype)

        weights = self.plan.read(read)
        # In memory of its own, as it is looked into for as long as the model runs.
        own = weights.embedding.clone()
        head = own if weights.head is weights.embedding else weights.head
        weights = replace(weights, embedding=own, head=head)
        return PreparedModel(self.facts, weights, self.sample, total * dtype.itemsize)

    def as_json(self) -> bytes:
        """All of it."""
        sample = np.ascontiguousarray(self.sample.numpy(), dtype="<f4")
        return json.dumps(
            {
                "facts": asdict(self.facts),
                "plan": asdict(self.plan),
                "shapes": self.shapes,
                "sample": {"rows": len(sample), "numbers": b64encode(sample.tobytes()).decode()},
            }
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """What `as_json` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls._of(json.loads(text))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no recipe: {error!r}") from error

    @classmethod
    def _of(cls, given: Any) -> Self:
        plan = given["plan"]
        layers = tuple(
            LayerPlan(**{**layer, "biases": tuple(layer["biases"])}) for layer in plan["layers"]
        )
        numbers = np.frombuffer(b64decode(given["sample"]["numbers"]), dtype="<f4")
        return cls(
            facts=ModelFacts(**given["facts"]),
            plan=DecoderPlan(
                **{**plan, "layers": layers, "frequencies": tuple(plan["frequencies"])}
            ),
            shapes={name: tuple(shape) for name, shape in given["shapes"].items()},
            sample=torch.from_numpy(numbers.reshape(given["sample"]["rows"], -1).copy()),
        )


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
