"""Scores the choices of a ``select`` on an SGLang server, by comparing token ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ..errors import BadRequestError
from ..types import ChoiceScore, TokenLogprob, Usage
from .endpoint_wire import Json, token_logprobs, usage_of

__all__ = ["ChoiceScorer"]

Ask = Callable[[Json, int], Awaitable[list[Json]]]
"""Sends the body of a ``/generate`` and gives that many results."""

_LOOK_BACK = 4
"""Tokens at the prompt's end that are scored again, for a choice may change how they split."""

_ONLY_COMPUTE = {"max_new_tokens": 0, "temperature": 0.0}

Row = tuple[TokenLogprob, ...]


class ChoiceScorer:
    """Scores texts as continuations of a prompt.

    The prompt is computed first, which leaves it in the server's cache. One batch then scores
    the prompt's end and all choices after it. A choice begins where its token ids and the
    prompt's first differ.

    Args:
        ask: makes a call.
        begin: the text of the token that begins a text, ``""`` if it is not known.

    Attributes:
        usage: of the calls made so far.
    """

    def __init__(self, ask: Ask, begin: str = "") -> None:
        self.usage = Usage(requests=1)
        self._ask = ask
        self._begin = begin

    async def score(
        self, prompt: str, choices: Sequence[str], *, unconditional: bool = False
    ) -> tuple[ChoiceScore, ...]:
        """The scores of ``choices``, at least one.

        Raises:
            BadRequestError: a choice has no token before it that it could follow.
        """
        rows = await self._after(prompt, choices)
        alone = await self._alone(rows) if unconditional else [None] * len(rows)
        return tuple(
            ChoiceScore(choice, _ids(row), tuple(_known(row)), free)
            for choice, row, free in zip(choices, rows, alone, strict=True)
        )

    async def _after(self, prompt: str, choices: Sequence[str]) -> list[Row]:
        """For each choice the tokens that it adds to the prompt."""
        prompt = prompt or self._begin
        texts = [prompt + choice for choice in choices]
        if not prompt:
            return [
                _trimmed(row, choice)
                for row, choice in zip(await self._rows({"text": texts}, 0), choices, strict=True)
            ]
        [result] = await self._call({"text": prompt, "sampling_params": _ONLY_COMPUTE}, 1)
        tokens = int(result["meta_info"]["prompt_tokens"])
        start = max(tokens - _LOOK_BACK, 0)
        prefix, *rows = await self._split([prompt, *texts], start)
        rows = [row[_common(prefix, row) :] for row in rows]
        return [
            row if row[0].logprob is not None else await self._without_before(prompt, choice, row)
            for row, choice in zip(rows, choices, strict=True)
        ]

    async def _split(self, texts: Sequence[str], start: int) -> list[Row]:
        """The tokens of the prompt and of the texts that begin with it, from where they agree."""
        try:
            prefix, *rows = await self._rows({"text": texts}, start)
        except BadRequestError:
            if not start:
                raise
        else:
            if not start or all(_common(prefix, row) for row in rows):
                return [prefix, *rows]
        # a choice changes tokens farther back, maybe so that there are fewer than before
        return await self._rows({"text": texts}, 0)

    async def _without_before(self, prompt: str, choice: str, row: Row) -> Row:
        """The tokens of a choice that is one with the whole prompt, after a begin token."""
        if self._begin and prompt != self._begin:
            [after_begin] = await self._after(self._begin, [prompt + choice])
            return after_begin
        return _trimmed(row, choice)

    async def _alone(self, rows: Sequence[Row]) -> list[tuple[float, ...]]:
        """The logprobs of the rows' tokens without the prompt; 0 for one with nothing before."""
        begin: tuple[int, ...] = ()
        if self._begin:
            [first] = await self._rows({"text": [self._begin]}, 0)
            begin = _ids(first)
        inputs = [[*begin, *_ids(row)] for row in rows]
        scored = await self._rows({"input_ids": inputs}, 0)
        return [tuple(entry.logprob or 0.0 for entry in found[len(begin) :]) for found in scored]

    async def _rows(self, prompts: Json, start: int) -> list[Row]:
        """The tokens of each prompt from the position ``start`` on, in one call."""
        [texts] = prompts.values()
        body = {
            **prompts,
            "sampling_params": _ONLY_COMPUTE,
            "return_logprob": True,
            "logprob_start_len": start,
        }
        results = await self._call(body, len(texts))
        return [token_logprobs(result["meta_info"], "input") for result in results]

    async def _call(self, body: Json, count: int) -> list[Json]:
        results = await self._ask(body, count)
        for result in results:
            used = usage_of([result["meta_info"]])
            self.usage += Usage(used.prompt_tokens, 0, used.cached_tokens)
        return results


def _common(prefix: Row, row: Row) -> int:
    """How many tokens the row has in common with the prefix; the last is never among them."""
    same = 0
    for mine, theirs in zip(prefix, row[:-1], strict=False):
        if mine.token_id != theirs.token_id:
            break
        same += 1
    return same


def _trimmed(row: Row, choice: str) -> Row:
    """The row without its first token, for which there is no logprob."""
    known = tuple(entry for entry in row if entry.logprob is not None)
    if not known:
        raise BadRequestError(
            f"the choice {choice!r} has no token before it to be scored after: "
            "put text before the select"
        )
    return known


def _ids(row: Row) -> tuple[int, ...]:
    return tuple(entry.token_id for entry in row if entry.token_id is not None)


def _known(row: Row) -> list[float]:
    return [entry.logprob for entry in row if entry.logprob is not None]
