"""Cores over one tiny model, whose steps follow one another in different ways."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Semaphore

import torch

from asyncsgl_engine.attention import TorchAttention
from asyncsgl_engine.background import BackgroundRunner
from asyncsgl_engine.config import DeviceFacts, EngineConfig
from asyncsgl_engine.constraints import Constraints
from asyncsgl_engine.core import EngineCore
from asyncsgl_engine.grammar import GrammarCompiler
from asyncsgl_engine.model import LoadedModel, load_model
from asyncsgl_engine.plan import Runner
from asyncsgl_engine.request import Grammar
from asyncsgl_engine.runner import ModelRunner
from asyncsgl_engine.tokenizer import Tokenizer
from tests.engine.conftest import VOCAB, byte_tokenizer

__all__ = ["AHEAD", "APART", "ASIDE", "Stage", "Way"]


@dataclass(frozen=True)
class Way:
    """How steps follow one another.

    Args:
        overlap: whether a step is planned before the one under way is taken in.
        thread: whether it is computed on a thread of its own.
    """

    overlap: bool
    thread: bool


APART, AHEAD, ASIDE = Way(False, False), Way(True, False), Way(True, True)


class Stage:
    """Makes cores over one tiny model, and ends their threads."""

    def __init__(self, folder: Path) -> None:
        self.model: LoadedModel = load_model(folder, torch.float32, torch.device("cpu"))
        self._folder = folder
        self._stack = ExitStack()

    def core(self, way: Way, *grammars: Grammar, **settings: int) -> EngineCore:
        """A core of its own; requests with these grammars need not wait for them."""
        config = EngineConfig(str(self._folder), dtype="float32", device="cpu", debug_check=True)
        config = replace(config, **settings)  # type: ignore[arg-type]
        facts = DeviceFacts("cpu", 1 << 30, True, 1)
        resolved = replace(config.resolve(self.model.facts, facts), overlap=way.overlap)
        runner: Runner = ModelRunner(self.model, resolved, TorchAttention())
        if way.thread:
            background = BackgroundRunner(runner)
            self._stack.callback(background.close)
            runner = background
        tokenizer = Tokenizer(byte_tokenizer())
        constraints = Constraints(lambda: GrammarCompiler(tokenizer, VOCAB))
        self._stack.callback(constraints.close)
        compiled = Semaphore(0)
        constraints.when_compiled(compiled.release)
        for grammar in grammars:
            constraints.compile(grammar)
            compiled.acquire()
        constraints.take_compiled()
        return EngineCore(resolved, runner, tokenizer, constraints)

    def close(self) -> None:
        self._stack.close()
