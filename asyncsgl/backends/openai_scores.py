"""How OpenAI's wire scores choices: echoed prompts with logprobs, and the Decisions API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, ContentFilterError
from ..types import ChoiceScore, GenRequest, Media, Scores, Usage
from .openai_wire import data_url, usage_of

if TYPE_CHECKING:
    from openai.types import Completion, Decision
    from openai.types.completion_choice import CompletionChoice

__all__ = [
    "MAX_CHOICES",
    "Echoed",
    "NoLogprobs",
    "choice_scores",
    "decision_input",
    "decision_scores",
]

_INSTRUCTIONS = "Choose what the assistant says next."
_LEAST = 1e-12
MAX_CHOICES = 255
"""The most that one question of the Decisions API may offer."""


class NoLogprobs(BackendError):
    """The service gave no logprobs of an echoed prompt."""


@dataclass(frozen=True, slots=True)
class Echoed:
    """The scores of echoed prompts, and what they cost."""

    scores: tuple[ChoiceScore, ...]
    usage: Usage


def choice_scores(
    found: Completion, prompt: str, choices: Sequence[str], unconditional: bool
) -> Echoed:
    """The scores from echoed prompts: each choice after the prompt, then each after a line end.

    A token that reaches from the prompt into the choice counts as the choice's.

    Raises:
        NoLogprobs: the server gave none.
    """
    answers = sorted(found.choices, key=lambda one: one.index)
    if len(answers) != len(choices) * (2 if unconditional else 1):
        raise NoLogprobs(f"the server gave {len(answers)} answers to {len(choices)} choices")
    scores: list[ChoiceScore] = []
    for index, choice in enumerate(choices):
        given = _after(answers[index], len(prompt), len(prompt) + len(choice))
        alone = None
        if unconditional:
            alone = _after(answers[len(choices) + index], 1, 1 + len(choice))
            if len(alone) != len(given):  # split otherwise after the line end: spread evenly
                alone = [math.fsum(alone) / len(given)] * len(given)
        ids = tuple(range(len(given)))
        scores.append(
            ChoiceScore(choice, ids, tuple(given), None if alone is None else tuple(alone))
        )
    return Echoed(tuple(scores), usage_of(found.usage) or Usage(requests=1))


def _after(answer: CompletionChoice, start: int, end: int) -> list[float]:
    """The logprobs of the tokens that reach beyond character ``start``."""
    logprobs = answer.logprobs
    if logprobs is None or not logprobs.token_logprobs:
        raise NoLogprobs("the server gave no logprobs of an echoed prompt")
    tokens, values = logprobs.tokens or [], logprobs.token_logprobs
    offsets = logprobs.text_offset or []
    base = offsets[0] if offsets else 0
    reaching: list[float | None] = []
    for token, value, offset in zip(tokens, values, offsets, strict=True):
        at = offset - base
        if at + len(token) > start and at < end:
            reaching.append(value)
    if not reaching:
        raise NoLogprobs("the server did not echo the prompt")
    return [value for value in reaching if value is not None] or [0.0]


def decision_input(request: GenRequest, backend: str) -> tuple[Any, str]:
    """The prompt as the Decisions API takes it, and the question's instructions."""
    messages = request.messages
    instructions = _INSTRUCTIONS
    if request.continue_assistant:
        *before, last = messages
        messages = tuple(before)
        if last.parts:
            instructions = f"{_INSTRUCTIONS} The answer so far: {last.text}"
    items = [
        {
            "role": message.role,
            "content": [
                {"type": "input_image", "image_url": data_url(part, backend)}
                if isinstance(part, Media)
                else {
                    "type": "output_text" if message.role == "assistant" else "input_text",
                    "text": part,
                }
                for part in message.parts
                if part
            ],
        }
        for message in messages
        if message.parts
    ]
    return items, instructions


def decision_scores(found: Decision, choices: Sequence[str], backend: str) -> Scores:
    """One logprob for each choice.

    Raises:
        ContentFilterError: the model declined.
    """
    answer = found.answers[0]
    if answer.type != "choice":
        raise ContentFilterError("the model declined to choose", backend=backend)
    probability = {str(entry.value): entry.probability for entry in answer.probabilities}
    used = found.usage
    return Scores(
        tuple(
            ChoiceScore(
                choice,
                (index,),
                (math.log(max(probability.get(choice, 0.0), _LEAST)),),
                (0.0,),
            )
            for index, choice in enumerate(choices)
        ),
        usage=Usage(
            used.input_tokens,
            used.output_tokens,
            used.input_tokens_details.cached_tokens,
            used.output_tokens_details.reasoning_tokens,
            1,
            used.input_tokens_details.cache_write_tokens,
        ),
    )
