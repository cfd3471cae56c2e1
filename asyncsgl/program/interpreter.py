"""Executes the nodes of a run's branches: the one place where nodes get their meaning."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from ..backends.base import Backend
from ..errors import InternalError, ProgramError
from ..lang.expr import (
    Gen,
    MediaNode,
    Ref,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    Select,
    TextNode,
    TextSource,
)
from ..lang.template import ChatTemplate
from ..types import Constraint, GenRequest, Media, Message, SamplingParams, Usage
from .branch import Barrier, Branch, ForkPoint, Item, JoinPoint, Task
from .events import BranchFinished, BranchStarted, Event, Listener, Text
from .generation import generate_into, select_into
from .joining import merge_children
from .variable import Variable

if TYPE_CHECKING:
    from .speculation import Speculation

__all__ = ["Interpreter"]

_request_numbers = itertools.count(1)
_NEEDS_WAITING = frozenset({Gen, Select, Ref, MediaNode})
_NOTHING_USED = Usage()


class Interpreter:
    """Runs the branches of one run. All of its tasks belong to ``tasks``.

    Args:
        backend: where models run.
        defaults: the run's sampling defaults; a generation's own fields win.
        tasks: the run's task group.
        listeners: take the run's events; none costs nothing.
        streaming: whether text is wanted piece by piece.
        speculation: calls for whole turns, where the program wants them and they are needed.
    """

    __slots__ = (
        "_beginning",
        "_busy",
        "_failed",
        "_rest",
        "_tasks",
        "backend",
        "defaults",
        "listeners",
        "main",
        "speculation",
        "streaming",
        "template",
        "usage",
    )

    def __init__(
        self,
        backend: Backend,
        defaults: SamplingParams,
        tasks: asyncio.TaskGroup,
        listeners: Sequence[Listener] = (),
        *,
        streaming: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        self.backend = backend
        self.defaults = defaults
        self.usage = _NOTHING_USED
        self.listeners = tuple(listeners)
        self.streaming = streaming
        self.speculation = speculation
        self.template: ChatTemplate | None = None
        self.main = Branch()
        self._tasks = tasks
        self._busy = 0
        self._failed: list[Branch] = []
        self._rest: asyncio.Future[None] | None = None
        self._beginning: asyncio.Handle | None = None

    # -- what the program asks for ------------------------------------------------

    def append(self, branch: Branch, items: Sequence[Item]) -> None:
        """Queue ``items``; what can be done at once is done at once."""
        if branch.failure is not None:
            for item in items:
                _fail_item(item, branch.failure)
            return
        busy = branch.busy
        for item in items:
            if isinstance(item, JoinPoint):
                _claim(item)
            if not busy:
                if self._apply_now(branch, item):
                    continue
                busy = True
                self._busy += 1
            branch.queue.append(item)
        self._start(branch)

    def fork(self, parent: Branch, children: Sequence[Branch]) -> None:
        """Start ``children`` from ``parent`` where its queue ends now."""
        for child in children:
            child.parent = parent
        parent.children += tuple(children)
        self._busy += len(children)
        self.append(parent, [ForkPoint(tuple(children))])

    async def finish(self) -> None:
        """Wait until every branch is at rest; raise the first failure that nobody took.

        On a failure all that is still under way is cancelled.
        """
        if self._beginning is not None and self._busy == 1:
            self._unschedule()
            self.main.task = asyncio.current_task()  # nobody else is at work: no task is needed
            await self._work(self.main)
        while self._busy and not self._unhandled():
            self._rest = asyncio.get_running_loop().create_future()
            await self._rest
        failed = self._unhandled()
        if failed is not None:
            self.cancel(self.main.family())
            assert failed.failure is not None
            raise failed.failure

    def close(self) -> None:
        """Start nothing any more, and give up calls whose text nobody will read."""
        self._unschedule()
        for branch in self.main.family():
            branch.drop_draft()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` beside the branches; the run waits for its end."""
        return self._tasks.create_task(work)

    def _unschedule(self) -> None:
        if self._beginning is not None:
            self._beginning.cancel()
            self._beginning = None

    async def settled(self, branch: Branch) -> None:
        """Wait until everything queued in ``branch`` so far is done; raise its failure."""
        if branch.busy:
            done = Variable(None)
            self.append(branch, [Barrier(done)])
            await done
        if branch.failure is not None:
            raise branch.failure

    def cancel(self, branches: Iterable[Branch]) -> None:
        """Cancel what ``branches`` still do."""
        for branch in branches:
            branch.drop_draft()
            if branch.task is not None and branch.started:
                branch.task.cancel()
            elif branch.busy:
                self._give_up(branch)

    async def chat_template(self) -> ChatTemplate:
        """The template in use, from the backend."""
        if self.template is None:
            self.template = await self.backend.chat_template_in_use()
        return self.template

    def emit(self, event: Event) -> None:
        """Hand an event to the listeners."""
        for listener in self.listeners:
            listener.on(event)

    def request(
        self, branch: Branch, sampling: SamplingParams, node: Gen | Select
    ) -> Coroutine[Any, Any, GenRequest]:
        """The request for ``node`` at the end of ``branch``."""
        messages = branch.prompt()
        if branch.role is None and not branch.parts:
            messages = (*messages, Message(None, ()))
        if isinstance(node, Gen):
            sampling = self.defaults.merged(sampling)
        constraint = node.constraint if isinstance(node, Gen) else None
        open_turn = branch.role == "assistant"
        return self.request_of(messages, sampling, constraint, open_turn=open_turn)

    async def request_of(
        self,
        messages: tuple[Message, ...],
        sampling: SamplingParams,
        constraint: Constraint | None = None,
        *,
        open_turn: bool,
    ) -> GenRequest:
        """The request for an answer to ``messages``; the last is to be continued if open."""
        text = None
        if self.backend.capabilities.wants_text:
            template = await self.chat_template()
            text = template.render(messages, continue_assistant=open_turn)
        return GenRequest(
            messages,
            sampling,
            f"gen-{next(_request_numbers):012x}",
            text,
            constraint,
            open_turn,
        )

    def greedy(self, temperature: float) -> SamplingParams:
        """The sampling of a select: nothing of the run's defaults but how it may vary."""
        return SamplingParams(temperature=temperature or None, seed=self.defaults.seed)

    # -- one branch -----------------------------------------------------------------

    def _apply_now(self, branch: Branch, item: Item) -> bool:
        """Execute an item that needs no waiting; False if it needs some."""
        if isinstance(item, Task):
            if type(item.node) in _NEEDS_WAITING:
                return False
            self._write(branch, item)
            return True
        if isinstance(item, JoinPoint):
            return False
        if isinstance(item, ForkPoint):
            self._open_gates(branch, item)
        else:
            item.done.resolve(None, None, None)
        return True

    def _start(self, branch: Branch) -> None:
        if not branch.queue or branch.task is not None or branch.gated:
            return
        if branch is not self.main:
            branch.task = self._tasks.create_task(self._work(branch))
        elif self._beginning is None:
            self._beginning = asyncio.get_running_loop().call_soon(self._start_main)

    def _start_main(self) -> None:
        """Start the main branch: the body waits for something, and did not come to its end."""
        self._beginning = None
        if self.main.queue and self.main.task is None:
            self.main.task = self._tasks.create_task(self._work(self.main))

    def _give_up(self, branch: Branch) -> None:
        """End a branch that has not begun to work: a task cancelled now would never run."""
        if branch.task is not None:
            branch.task.cancel()
            branch.task = None
        self._fail(branch, self._why_stopped(branch), handled=True)
        branch.gated = False
        self._came_to_rest(branch)

    def _why_stopped(self, branch: Branch) -> Exception:
        """What a cancelled branch's variables raise: the failure that it was cancelled for."""
        cause = next((b.failure for b in self._failed if b.failure is not None), None)
        return cause or ProgramError(f"branch {branch.path} was cancelled")

    async def _work(self, branch: Branch) -> None:
        """Execute the queue in order until it is empty or fails."""
        branch.started = True
        item: Item | None = None
        try:
            while branch.queue:
                item = branch.queue.pop(0)
                if not self._apply_now(branch, item):
                    await self._execute(branch, item)
        except Exception as error:  # noqa: BLE001 - every await of the branch raises it
            self._fail(branch, error, item)
        except BaseException:
            self._fail(branch, self._why_stopped(branch), item, handled=True)
            raise
        finally:
            branch.task = None
            branch.started = False
            self._came_to_rest(branch)

    def _came_to_rest(self, branch: Branch) -> None:
        self._busy -= 1
        branch.notify()
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)

    def _fail(
        self, branch: Branch, error: Exception, item: Item | None = None, *, handled: bool = False
    ) -> None:
        """Mark ``branch`` as failed, and with it all that it has queued."""
        branch.drop_draft()
        if branch.failure is None:
            branch.failure = error
            if not handled:
                self._failed.append(branch)
        pending = [item] if item is not None else []
        pending += branch.queue
        branch.queue.clear()
        for left in pending:
            _fail_item(left, error)
            if isinstance(left, ForkPoint):
                self._fail_gated(left.children, error)
        if self.listeners and branch.path and not branch.gated:
            self.emit(BranchFinished(branch.path, error))

    def _fail_gated(self, children: Sequence[Branch], error: Exception) -> None:
        for child in children:
            if child.gated:
                self._fail(child, error, handled=True)
                child.gated = False
                self._came_to_rest(child)

    def _unhandled(self) -> Branch | None:
        return next((branch for branch in self._failed if not branch.handled), None)

    # -- the meaning of each item -----------------------------------------------------

    def _execute(self, branch: Branch, item: Item) -> Coroutine[Any, Any, None]:
        """What executes an item that needs waiting."""
        match item:
            case Task(node=Gen() | Select() as node) if (
                self.speculation is not None and branch.role == "assistant"
            ):
                return self.speculation.fill(self, branch, node, item)
            case Task(node=Gen() as node):
                return generate_into(self, branch, node, item)
            case Task(node=Select() as node):
                return select_into(self, branch, node, item)
            case Task(node=Ref(source=source)):
                return self._use(branch, source)
            case Task(node=MediaNode(load=load)):
                return self._show(branch, load)
            case JoinPoint():
                return self._join(branch, item)
            case Task() | ForkPoint() | Barrier():
                raise InternalError(f"nothing to wait for: {item!r}")
            case _:
                assert_never(item)

    async def _use(self, branch: Branch, source: TextSource) -> None:
        value: object = await source
        if not isinstance(value, str):
            raise ProgramError(
                f"the variable {source.name!r} is a list and cannot be appended as text: "
                "append one of its elements"
            )
        self._add_text(branch, value)

    async def _show(self, branch: Branch, load: Callable[[], Awaitable[Media]]) -> None:
        branch.parts.append(await load())

    def _write(self, branch: Branch, task: Task) -> None:
        """Execute a node that needs no waiting."""
        match task.node:
            case TextNode(text=text):
                self._add_text(branch, text)
            case RoleBegin(role=role):
                branch.drop_draft()
                branch.begin(role)
            case RoleEnd():
                branch.drop_draft()
                branch.close()
            case ScopeBegin(name=name):
                branch.scopes[name] = branch.mark()
            case ScopeEnd(name=name):
                text = branch.text_since(branch.scopes.pop(name))
                assert task.variable is not None
                task.variable.resolve(text, text, None)
            case _:
                raise InternalError(f"not a node without waiting: {task.node!r}")

    def _add_text(self, branch: Branch, text: str) -> None:
        branch.parts.append(text)
        if self.streaming and text:
            self.emit(Text(branch.path, None, text))

    def _open_gates(self, parent: Branch, fork: ForkPoint) -> None:
        for child in fork.children:
            if not child.gated:  # given up meanwhile
                continue
            child.start_from(parent)
            if self.listeners:
                self.emit(BranchStarted(child.path))
            if child.queue:
                self._start(child)
            else:
                self._came_to_rest(child)

    async def _join(self, parent: Branch, join: JoinPoint) -> None:
        failed = await self._children_at_rest(join)
        if failed is not None and not join.tolerant:
            busy = [b for child in join.children for b in child.family() if b.busy]
            self.cancel(busy)
            await self._all_at_rest(busy)
            assert failed.failure is not None
            raise failed.failure
        merge_children(parent, join)
        if self.listeners:
            for child in join.children:
                if child.failure is None:
                    self.emit(BranchFinished(child.path))

    async def _children_at_rest(self, join: JoinPoint) -> Branch | None:
        """Wait for the children: the first that failed, or None when all are at rest."""
        failed: list[Branch] = [child for child in join.children if child.failure is not None]
        left = [child for child in join.children if child.busy]
        if not left or (failed and not join.tolerant):
            return failed[0] if failed else None
        rest = asyncio.get_running_loop().create_future()
        waiting = len(left)

        def came_to_rest(child: Branch) -> None:
            nonlocal waiting
            waiting -= 1
            if child.failure is not None:
                failed.append(child)
            if not rest.done() and (waiting == 0 or (failed and not join.tolerant)):
                rest.set_result(None)

        for child in left:
            child.listeners += (came_to_rest,)
        await rest
        return failed[0] if failed else None

    async def _all_at_rest(self, branches: Sequence[Branch]) -> None:
        tasks = [branch.task for branch in branches if branch.task is not None]
        if tasks:
            await asyncio.wait(tasks)


def _claim(join: JoinPoint) -> None:
    """The failures of the children are the join's business from now on."""
    for child in join.children:
        child.claimed = True
        child.tolerated = join.tolerant


def _fail_item(item: Item, error: Exception) -> None:
    match item:
        case Task(variable=variable, reasoning=reasoning):
            for target in (variable, reasoning):
                if target is not None:
                    target.fail(error)
        case JoinPoint(gathered=gathered, done=done):
            for target, _ in gathered:
                target.fail(error)
            done.fail(error)
        case Barrier(done=done):
            done.fail(error)
        case ForkPoint():
            pass
        case _:
            assert_never(item)
