"""How many tokens a call will cost, before the service says it."""

from __future__ import annotations

from ..types import Usage
from .calls import Call

__all__ = ["UNSAID_LIMIT", "Estimates"]

UNSAID_LIMIT = 4096
"""Tokens that an answer is reckoned with where the call says no number."""
_IMAGE_TOKENS = 1500


class Estimates:
    """Tokens of prompts and answers, by what those before them cost."""

    __slots__ = ("_answer_tokens", "_tokens_per_character")

    def __init__(self) -> None:
        self._tokens_per_character = 0.25
        self._answer_tokens: float | None = None

    def prompt(self, call: Call) -> int:
        """Tokens of the call's prompt."""
        return self.text(call.size()) + _IMAGE_TOKENS * call.images()

    def text(self, characters: int) -> int:
        """Tokens of a text of so many characters."""
        return round(characters * self._tokens_per_character)

    def most(self, call: Call) -> Usage:
        """The most that the call can cost."""
        prompt = max(self.prompt(call), call.size() // 3)
        limit = UNSAID_LIMIT if call.max_tokens is None else call.max_tokens
        return Usage(prompt, limit * (call.sampling.n or 1))

    def likely(self, call: Call, most: Usage) -> float:
        """Tokens that the call is likely to cost, prompt and answer together."""
        answer: float = most.completion_tokens
        if self._answer_tokens is not None:
            answer = min(answer, 1.2 * self._answer_tokens + 8)
        return self.prompt(call) + answer

    def sent(self, call: Call, written: int) -> Usage:
        """The cost of a call whose end was not seen; ``written`` characters came of its answer."""
        return Usage(self.prompt(call), self.text(written), requests=1)

    def correct(self, call: Call, usage: Usage) -> None:
        """Move the estimates towards what ``call`` really cost."""
        characters = call.size()
        if characters >= 64 and not call.images():
            measured = min(usage.prompt_tokens / characters, 2.0)
            self._tokens_per_character += 0.1 * (measured - self._tokens_per_character)
        if call.max_tokens is not None and call.max_tokens <= 1:
            return  # a choice: it says nothing of answers
        answer, known = float(usage.completion_tokens), self._answer_tokens
        self._answer_tokens = answer if known is None else known + 0.1 * (answer - known)
