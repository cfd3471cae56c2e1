"""How ``select`` decides: scoring rules on plain numbers.

The three rules are those of SGLang's frontend (``lang/choices.py`` there); "unconditional
likelihood normalized" is described in https://arxiv.org/abs/2211.03818 as a correction for
how probable a text is by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..types import ChoiceScore

__all__ = [
    "ChoicesMethod",
    "Decision",
    "greedy_token_selection",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
]


@dataclass(frozen=True, slots=True)
class Decision:
    """A rule's choice.

    Args:
        index: of the chosen text.
        scores: one for each choice; higher is better. Their scale is the rule's own.
    """

    index: int
    scores: tuple[float, ...]


class ChoicesMethod(Protocol):
    """A scoring rule.

    Attributes:
        unconditional: the rule needs the choices' logprobs without the prompt, too.
    """

    @property
    def unconditional(self) -> bool:
        """Whether the rule needs unconditional logprobs."""
        raise NotImplementedError

    def __call__(self, choices: Sequence[ChoiceScore]) -> Decision:
        """Decide among at least one scored choice."""
        raise NotImplementedError


def _best(scores: Sequence[float]) -> Decision:
    return Decision(max(range(len(scores)), key=scores.__getitem__), tuple(scores))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class _TokenLengthNormalized:
    """The highest mean logprob a token."""

    unconditional: bool = False

    def __call__(self, choices: Sequence[ChoiceScore]) -> Decision:
        return _best([_mean(choice.logprobs) for choice in choices])


@dataclass(frozen=True, slots=True)
class _GreedyTokenSelection:
    """The choice that greedy decoding limited to the choices would write.

    At each position only the choices whose token there is the most probable one stay. A
    choice that is a prefix of another is followed by the mean of its own logprobs, so that
    neither always wins.
    """

    unconditional: bool = False

    def __call__(self, choices: Sequence[ChoiceScore]) -> Decision:
        longest = max(len(choice.logprobs) for choice in choices)
        rows = [
            (*choice.logprobs, *[_mean(choice.logprobs)] * (longest - len(choice.logprobs)))
            for choice in choices
        ]
        alive = list(range(len(choices)))
        scores = [0.0] * len(choices)
        for position in range(longest):
            best = max(rows[i][position] for i in alive)
            alive = [i for i in alive if rows[i][position] == best]
            for i in alive:
                scores[i] += 1.0
            if len(alive) == 1:
                break
        return Decision(alive[0], tuple(scores))


@dataclass(frozen=True, slots=True)
class _UnconditionalLikelihoodNormalized:
    """The highest mean of logprob minus the same token's logprob without the prompt."""

    unconditional: bool = True

    def __call__(self, choices: Sequence[ChoiceScore]) -> Decision:
        scores = []
        for choice in choices:
            alone = choice.unconditional
            assert alone is not None, "the rule asked for unconditional logprobs"
            scores.append(
                _mean([given - free for given, free in zip(choice.logprobs, alone, strict=True)])
            )
        return _best(scores)


token_length_normalized: ChoicesMethod = _TokenLengthNormalized()
greedy_token_selection: ChoicesMethod = _GreedyTokenSelection()
unconditional_likelihood_normalized: ChoicesMethod = _UnconditionalLikelihoodNormalized()
