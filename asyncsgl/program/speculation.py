"""API speculation: one call for a whole assistant turn, from which the turn's values are read.

Chat APIs cannot continue a turn, so that a generation after other text of its turn would have
no call. ``@function(num_api_spec_tokens=N)``, which SGLang's frontend has, asks for the whole
turn at once instead and matches the answer with what the program says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from ..backends.base import Backend
from ..backends.planning import NEUTRAL, folded
from ..errors import TruncatedStreamError, UnsupportedFeature
from ..lang.expr import Gen, Select
from ..types import (
    Completion,
    Delta,
    Generation,
    GenRequest,
    Message,
    SamplingParams,
    Scores,
    Timings,
    Usage,
)
from .branch import Branch, Item, Task
from .constrained import choice_at, value_at
from .door import Door
from .draft import Draft, Reading
from .events import Reasoning, Text
from .generation import (
    choose,
    generate,
    generate_into,
    select_into,
    split,
    store,
    store_choice,
    watched,
)
from .turn_form import correction, ends, text_after, upcoming

if TYPE_CHECKING:
    from .interpreter import Interpreter

__all__ = ["Speculation"]

TRIES = 3
"""Calls for one whole turn, as many as SGLang's frontend makes."""
_ALONE = "num_api_spec_tokens: no answer for the whole turn fitted, so this was asked alone"
_OTHERWISE = "num_api_spec_tokens: asked alone, as it samples otherwise than its turn"
_NOT_IN_A_DRAFT = (
    "n",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "return_logprob",
    "top_logprobs_num",
    "logprob_start_len",
)


class _Misfit(Exception):
    """The answer is not what the program says; the message tells the model."""


class Speculation:
    """Calls for whole turns in one run.

    An answer that does not fit is asked for again, and the model is told what was wrong and
    what the turn looks like; what was read of the turn by then stays. After three calls for a
    turn each value is asked for by itself.

    Args:
        tokens: most tokens of a call for a whole turn.
        door: how the body reaches the run.
    """

    def __init__(self, tokens: int, door: Door) -> None:
        self._tokens = tokens
        self._door = door

    @staticmethod
    def of(tokens: int | None, backend: Backend, door: Door) -> Speculation | None:
        """What a run needs of it: nothing where turns can be continued, or nobody asks for it."""
        if tokens is None or backend.capabilities.support("continue_assistant") == "native":
            return None
        return Speculation(tokens, door)

    async def fill(self, run: Interpreter, branch: Branch, node: Gen | Select, task: Task) -> None:
        """Set the task's variables from a draft of the open turn, asking for one if needed.

        Raises:
            UnsupportedFeature: before anything is sent.
            BackendError: the backend refused or failed.
        """
        await self._door.pause(lambda: ends(branch.queue))
        if self._needless(run, branch, node):
            if isinstance(node, Gen):
                await generate_into(run, branch, node, task)
            else:
                await select_into(run, branch, node, task)
            return
        draft = _draft_of(branch)
        sampling = _sampling(run, node, branch.queue)
        request = draft.request if draft else await self._request(run, branch, sampling)
        _refuse(run, request, [node, *upcoming(branch.queue)])
        with watched(run, branch, node, request):
            value, reading = await self._made(run, branch, node, sampling, request)
        if isinstance(value, Scores):
            assert isinstance(node, Select)
            store_choice(run, branch, node, task, request, value)
        else:
            assert isinstance(node, Gen)
            if run.streaming and reading is not None:
                _show_split(run, branch, node, value)
            store(run, branch, node, task, value)
        if reading is not None and branch.draft is not None:
            branch.draft.took(branch, reading)

    def _needless(self, run: Interpreter, branch: Branch, node: Gen | Select) -> bool:
        """Whether the backend can do it by an ordinary call."""
        if isinstance(node, Select) and run.backend.capabilities.support("select") == "native":
            return True
        alone = ends(branch.queue) and not upcoming(branch.queue)
        return alone and not branch.parts

    async def _made(
        self,
        run: Interpreter,
        branch: Branch,
        node: Gen | Select,
        sampling: SamplingParams,
        request: GenRequest,
    ) -> tuple[Generation | Scores, Reading | None]:
        """The node's value, and what of the draft it is; None where it is not from one."""
        draft = _draft_of(branch)
        if draft is not None and isinstance(node, Gen) and draft.sampling != sampling:
            return await _alone(run, branch, node, _OTHERWISE), None
        while True:
            why = ""
            if draft is not None:
                try:
                    return await self._read(run, branch, node, draft)
                except _Misfit as misfit:
                    why = str(misfit)
                if draft.tries == TRIES:
                    return await _alone(run, branch, node, _ALONE), None
                turns = correction(branch, node, draft, why)
                request = await self._request(run, branch, sampling, turns)
            draft = await _begin(run, branch, sampling, request)

    async def _request(
        self,
        run: Interpreter,
        branch: Branch,
        sampling: SamplingParams,
        more: Sequence[Message] = (),
    ) -> GenRequest:
        """The call for the whole open turn."""
        messages = (*branch.messages, *more, Message("assistant", ()))
        limited = replace(sampling, max_tokens=self._tokens)
        return await run.request_of(messages, limited, open_turn=True)

    async def _read(
        self, run: Interpreter, branch: Branch, node: Gen | Select, draft: Draft
    ) -> tuple[Generation | Scores, Reading]:
        """Read the node's value off the draft.

        Raises:
            _Misfit: the draft is not what the program says.
        """
        if not await draft.follows(branch):
            raise _Misfit(f"it does not begin with {branch.open_text!r}")
        read_from = f"num_api_spec_tokens: read from one call of {self._tokens} tokens"
        if isinstance(node, Select):
            reading, index = await _read_choice(node, draft)
            return (
                Scores(decision=index, usage=draft.usage(), emulated=(f"select: {read_from}",)),
                reading,
            )
        reading = await _read_value(run, branch, node, draft)
        words = [f"{read_from} for the whole turn"]
        own = run.defaults.merged(node.sampling)
        if own.max_tokens is not None:
            words.append("max_tokens: that of the whole turn")
        if node.constraint is not None:
            words.append(f"{node.constraint.kind}: checked, and asked again where it does not fit")
        return _generation(draft, reading, words), reading


def _draft_of(branch: Branch) -> Draft | None:
    """The draft of the open turn."""
    draft = branch.draft
    return draft if draft is not None and draft.turn == len(branch.messages) else None


def _sampling(run: Interpreter, node: Gen | Select, queue: Sequence[Item]) -> SamplingParams:
    """How to sample a turn: as its generations say, but for what ends a text."""
    nodes = [node, *upcoming(queue)]
    first = next((node.sampling for node in nodes if isinstance(node, Gen)), SamplingParams())
    return _without_ends(run.defaults.merged(first))


def _without_ends(sampling: SamplingParams) -> SamplingParams:
    return replace(sampling, stop=None, stop_regex=None, max_tokens=None)


def _refuse(run: Interpreter, request: GenRequest, nodes: Sequence[Gen | Select]) -> None:
    """Refuse what a draft of the turn cannot give.

    Raises:
        UnsupportedFeature: names it.
    """
    run.backend.check(request)
    for node in nodes:
        if isinstance(node, Select):
            continue
        sampling = run.defaults.merged(node.sampling)
        run.backend.check(replace(request, sampling=_without_ends(sampling)))
        asked = [
            name
            for name in _NOT_IN_A_DRAFT
            if getattr(sampling, name) not in (None, NEUTRAL.get(name))
        ]
        if node.constraint is not None and node.constraint.kind == "ebnf":
            asked.append("ebnf")
        if asked:
            raise UnsupportedFeature(
                run.backend.name,
                asked[0],
                "num_api_spec_tokens asks for the whole turn in one call, which has no such "
                "thing: leave it out, or give this gen a turn of its own",
            )


# -- calls ---------------------------------------------------------------------------------------


async def _begin(
    run: Interpreter, branch: Branch, sampling: SamplingParams, request: GenRequest
) -> Draft:
    """Make the call for the whole turn; where text is wanted piece by piece, only begin it."""
    before = _draft_of(branch)
    tries = before.tries if before is not None else 0
    branch.drop_draft()
    draft = Draft(request, sampling, len(branch.messages), tries + 1)
    branch.draft = draft
    if run.streaming:
        draft.task = run.start(_grow(run, draft))
        return draft
    generation = await run.backend.generate(request)
    run.usage += generation.usage
    completion = generation.completions[0]
    draft.add(Delta(completion.text, reasoning=completion.reasoning or "", generation=generation))
    draft.end()
    return draft


async def _grow(run: Interpreter, draft: Draft) -> None:
    """Take the pieces of a draft's call as they come."""
    error: Exception | None = None
    try:
        async with aclosing(run.backend.stream(draft.request)) as deltas:
            async for delta in deltas:
                draft.add(delta)
        if draft.generation is None:
            raise TruncatedStreamError(
                "the stream ended without its result",
                backend=run.backend.name,
                request_id=draft.request.request_id,
            )
    except Exception as failure:  # noqa: BLE001 - raised where the draft is read
        error = failure
    finally:
        if draft.generation is not None:
            run.usage += draft.generation.usage
        elif error is None:
            run.usage += _estimate(draft)  # it was given up: nobody says what it cost
        draft.end(error)


def _estimate(draft: Draft) -> Usage:
    prompt = sum(len(message.text) for message in draft.request.messages)
    return Usage((prompt + 3) // 4, (len(draft.text) + 3) // 4, requests=1)


async def _alone(
    run: Interpreter, branch: Branch, node: Gen | Select, words: str
) -> Generation | Scores:
    """The node's value by a call of its own."""
    if isinstance(node, Select):
        request = await run.request(branch, run.greedy(node.temperature), node)
        run.backend.check_select(request)
        scores = await choose(run, node, request)
        return replace(scores, emulated=(*scores.emulated, words))
    request = await run.request(branch, node.sampling, node)
    if branch.parts and run.backend.capabilities.support("continue_assistant") == "refused":
        messages = (*folded(request.messages), Message("assistant", ()))
        request = await run.request_of(
            messages, request.sampling, request.constraint, open_turn=True
        )
    run.backend.check(request)
    generation = await generate(run, branch, node, request)
    return replace(generation, emulated=(*generation.emulated, words))


# -- reading -------------------------------------------------------------------------------------


async def _read_choice(node: Select, draft: Draft) -> tuple[Reading, int]:
    try:
        index, end = choice_at(await draft.whole(), node.choices)
    except ValueError as error:
        raise _Misfit(str(error)) from error
    return Reading(node.choices[index], draft.start + end), index


async def _read_value(run: Interpreter, branch: Branch, node: Gen, draft: Draft) -> Reading:
    sampling = run.defaults.merged(node.sampling)
    stops, patterns = tuple(sampling.stop or ()), tuple(sampling.stop_regex or ())
    after = text_after(branch.queue)

    def show(piece: str) -> None:
        if run.streaming and piece:
            run.emit(Text(branch.path, node.name, piece))

    if node.constraint is None:
        in_pieces = node.reasoning is None
        reading = await draft.read(stops, patterns, after, show if in_pieces else _keep)
        if draft.exhausted:
            raise _Misfit("it ends too early")
        return reading
    try:
        text, end = value_at(await draft.whole(), node.constraint, stops, after)
    except ValueError as error:
        raise _Misfit(str(error)) from error
    show(text)
    return Reading(text, draft.start + end)


def _show_split(run: Interpreter, branch: Branch, node: Gen, generation: Generation) -> None:
    """Show the reasoning, and the answer that it was to be split off from."""
    reasoning, answer = split(node, generation.completions[0])
    if reasoning:
        run.emit(Reasoning(branch.path, node.name, reasoning))
    if node.reasoning is not None and answer:
        run.emit(Text(branch.path, node.name, answer))


def _keep(piece: str) -> None:
    """Show nothing yet."""


def _generation(draft: Draft, reading: Reading, words: Sequence[str]) -> Generation:
    """The value as a generation of its own; what the call cost is told once."""
    call, usage = draft.generation, draft.usage()
    completion = Completion(
        reading.text,
        reading.finish,
        reading.matched,
        reasoning=draft.reasoning or None,
        completion_tokens=usage.completion_tokens,
    )
    draft.reasoning = ""
    return Generation(
        (completion,),
        usage,
        call.request_id if call else draft.request.request_id,
        call.model if call else "",
        call.timings if call else Timings(),
        (*words, *(call.emulated if call else ())),
    )
