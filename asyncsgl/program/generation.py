"""Executes ``gen`` and ``select``: one model call, its result into variables and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from ..errors import OutputError, TruncatedStreamError
from ..lang.reasoning import ReasoningSplitter, check_family
from ..types import Completion, Delta, Generation, GenRequest, Meta, Scores
from .events import (
    Reasoning,
    Text,
    VariableFailed,
    VariableFinished,
    VariableStarted,
)

if TYPE_CHECKING:
    from ..lang.expr import Gen, Select
    from .branch import Branch, Task
    from .interpreter import Interpreter

__all__ = ["choose", "generate", "generate_into", "select_into", "store", "store_choice", "watched"]

T = TypeVar("T")
_UNWATCHED = nullcontext()


async def generate_into(run: Interpreter, branch: Branch, node: Gen, task: Task) -> None:
    """Generate at the end of ``branch`` and set the task's variables.

    Raises:
        UnsupportedFeature: before anything is sent.
        BackendError: the backend refused or failed.
    """
    request = await run.request(branch, node.sampling, node)
    run.backend.check(request)
    with watched(run, branch, node, request):
        generation = await generate(run, branch, node, request)
    store(run, branch, node, task, generation)


def watched(
    run: Interpreter, branch: Branch, node: Gen | Select, request: GenRequest
) -> AbstractContextManager[None]:
    """Tell the listeners, if there are some, that the node's variable is begun, and if it fails."""
    return _told(run, branch, node, request) if run.listeners else _UNWATCHED


@contextmanager
def _told(
    run: Interpreter, branch: Branch, node: Gen | Select, request: GenRequest
) -> Iterator[None]:
    run.emit(VariableStarted(branch.path, node.name, request, run.backend.name))
    try:
        yield
    except BaseException as error:
        run.emit(VariableFailed(branch.path, node.name, error))
        raise


async def generate(run: Interpreter, branch: Branch, node: Gen, request: GenRequest) -> Generation:
    """Make one call for ``node``, showing its pieces to the listeners where these are wanted."""
    if run.streaming:
        generation = await _streamed(run, branch, node, request)
    else:
        generation = await run.backend.generate(request)
    run.usage += generation.usage
    return generation


def store(run: Interpreter, branch: Branch, node: Gen, task: Task, generation: Generation) -> None:
    """Set the task's variables to what was generated, and put its text down."""
    answers = [split(node, completion) for completion in generation.completions]
    texts = [answer for _, answer in answers]
    metas: list[Meta] = []
    typed: list[object] = []
    for text, completion in zip(texts, generation.completions, strict=True):
        value = _typed(node.decode, text, completion)
        typed.append(value)
        error = str(value) if isinstance(value, OutputError) else None
        metas.append(_meta(run, generation, completion, error))
    branch.parts.append(texts[0])
    shown, meta = _one_or_all(texts), _one_or_all(metas)
    if task.reasoning is not None:
        thoughts = _one_or_all([reasoning for reasoning, _ in answers])
        task.reasoning.resolve(thoughts, thoughts, None)
    if task.variable is not None:
        task.variable.resolve(shown, _one_or_all(typed), meta)
    if run.listeners:
        run.emit(VariableFinished(branch.path, node.name, shown, meta))


def _one_or_all(values: list[T]) -> T | list[T]:
    """The value itself where there is one answer, the list where there are several."""
    return values if len(values) > 1 else values[0]


def split(node: Gen, completion: Completion) -> tuple[str, str]:
    """(reasoning, answer) of a completion."""
    if completion.reasoning is not None or node.reasoning is None:
        return completion.reasoning or "", completion.text
    splitter = ReasoningSplitter(check_family(node.reasoning))
    first, rest = splitter.push(completion.text), splitter.flush()
    return first[0] + rest[0], first[1] + rest[1]


def _typed(decode: Callable[[str], object] | None, text: str, completion: Completion) -> object:
    """The typed value, or the error that reading it will raise."""
    if decode is None:
        return text
    try:
        return decode(text)
    except ValueError as error:
        cut = completion.finish_reason == "length"
        reason = "it was cut off by max_tokens" if cut else str(error)
        return OutputError(f"the text {_short(text)} has no value of the type asked for: {reason}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _meta(
    run: Interpreter, generation: Generation, completion: Completion, error: str | None
) -> Meta:
    return Meta(
        finish_reason=completion.finish_reason,
        matched_stop=completion.matched_stop,
        prompt_tokens=generation.usage.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        cached_tokens=generation.usage.cached_tokens,
        logprobs=completion.logprobs,
        prompt_logprobs=completion.prompt_logprobs,
        timings=generation.timings,
        model=generation.model,
        backend=run.backend.name,
        request_id=generation.request_id,
        emulated=generation.emulated,
        error=error,
    )


async def _streamed(run: Interpreter, branch: Branch, node: Gen, request: GenRequest) -> Generation:
    """Generate piece by piece, handing the pieces to the listeners."""
    family = None if node.reasoning is None else check_family(node.reasoning)
    splitters: dict[int, ReasoningSplitter | None] = {}
    generation: Generation | None = None

    def show(index: int, reasoning: str, text: str, delta: Delta | None = None) -> None:
        if reasoning:
            run.emit(Reasoning(branch.path, node.name, reasoning, index))
        if text:
            logprobs = delta.logprobs if delta is not None else ()
            run.emit(Text(branch.path, node.name, text, index, logprobs))

    async with aclosing(run.backend.stream(request)) as deltas:
        async for delta in deltas:
            generation = delta.generation or generation
            if delta.reasoning:
                splitters[delta.index] = None  # the backend splits it off itself
            elif delta.index not in splitters:
                splitters[delta.index] = ReasoningSplitter(family) if family else None
            splitter = splitters[delta.index]
            if splitter is None:
                show(delta.index, delta.reasoning, delta.text, delta)
            else:
                show(delta.index, *splitter.push(delta.text), delta)
    for index, splitter in splitters.items():
        if splitter is not None:
            show(index, *splitter.flush())
    if generation is None:
        raise TruncatedStreamError(
            "the stream ended without its result",
            backend=run.backend.name,
            request_id=request.request_id,
        )
    return generation


async def select_into(run: Interpreter, branch: Branch, node: Select, task: Task) -> None:
    """Choose among the node's texts at the end of ``branch`` and set the task's variable.

    Raises:
        UnsupportedFeature: the backend can neither score nor emulate it.
        BackendError: the backend refused or failed.
    """
    request = await run.request(branch, run.greedy(node.temperature), node)
    run.backend.check_select(request)
    with watched(run, branch, node, request):
        scores = await choose(run, node, request)
    store_choice(run, branch, node, task, request, scores)


async def choose(run: Interpreter, node: Select, request: GenRequest) -> Scores:
    """Have the node's choices scored, or one of them chosen."""
    scores = await run.backend.score(request, node.choices, unconditional=node.method.unconditional)
    run.usage += scores.usage
    return scores


def store_choice(
    run: Interpreter, branch: Branch, node: Select, task: Task, request: GenRequest, scores: Scores
) -> None:
    """Set the task's variable to what was chosen, and put its text down."""
    index, meta = _decide(run, node, request, scores)
    text = node.choices[index]
    branch.parts.append(text)
    if task.variable is not None:
        typed = text if node.decode is None else node.decode(text)
        task.variable.resolve(text, typed, meta)
    if run.listeners:
        if run.streaming:
            run.emit(Text(branch.path, node.name, text))
        run.emit(VariableFinished(branch.path, node.name, text, meta))


def _decide(
    run: Interpreter, node: Select, request: GenRequest, scores: Scores
) -> tuple[int, Meta]:
    decision = None if scores.decision is not None else node.method(scores.choices)
    index = scores.decision if decision is None else decision.index
    assert index is not None
    return index, Meta(
        finish_reason="stop",
        prompt_tokens=scores.usage.prompt_tokens,
        completion_tokens=scores.usage.completion_tokens,
        cached_tokens=scores.usage.cached_tokens,
        choices=node.choices,
        choice_scores=decision.scores if decision is not None else None,
        choice_logprobs=tuple(choice.logprobs for choice in scores.choices) or None,
        timings=scores.timings,
        backend=run.backend.name,
        request_id=request.request_id,
        emulated=scores.emulated,
    )
