"""From a configuration to a core that is ready to step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .attention import AttentionBackend, TorchAttention, build_triton
from .background import BackgroundRunner
from .config import DeviceFacts, EngineConfig, ModelFacts, ResolvedConfig
from .constraints import Constraints
from .core import EngineCore
from .device import inspect_device
from .errors import ConfigError, EngineError, ModelError, RankFailed
from .hub import Progress
from .hub.cache import default_cache_root
from .hub.notes import Notes
from .lowering import NotAsBefore
from .native import Library, NativeAttention, build_library
from .plan import Runner
from .profiling import Profiler
from .recall import UNREADABLE, Memory
from .recipe import PreparedModel
from .runner import ModelRunner
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .grammar import GrammarCompiler
    from .model import LoadedModel
    from .multimodal import ImageReader
    from .parallel import Ranks

__all__ = ["Loaded", "load"]

_LOG = logging.getLogger(__name__)
_STAGE = "Loading the model"

# Transformers, llguidance and torch.distributed are imported where they are used: a start that
# needs none of them takes less than half the time.


@dataclass(frozen=True, slots=True)
class Loaded:
    """A core and what it was made of.

    Args:
        core: ready to step.
        constraints: compiles grammars and makes masks for it.
        tokenizer: the model's.
        config: as decided.
        images: reads images, or why there are none to be read.
        profiler: records what the core computes.
        resources: ends the threads and processes that they have.
    """

    core: EngineCore
    constraints: Constraints
    tokenizer: Tokenizer
    config: ResolvedConfig
    images: ImageReader | str
    profiler: Profiler
    resources: ExitStack


def load(
    config: EngineConfig,
    path: Path,
    progress: Progress,
    on_fault: Callable[[RankFailed], None],
) -> Loaded:
    """Load and connect everything; see `start`.

    Args:
        path: the model's folder.
    """
    progress(_STAGE, None)
    device = inspect_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.tp_size > 1:
        loaded = _load_shared(config, path, device, on_fault)
    else:
        loaded = _load_alone(config, path, device, progress)
    progress(_STAGE, 1.0)
    return loaded


def _load_alone(
    config: EngineConfig, path: Path, device: DeviceFacts, progress: Progress
) -> Loaded:
    """As an earlier start learnt to, or else with transformers."""
    words = _tokenizer_folder(config, path)
    dtype = config.resolve_dtype(device)
    library = _library(config.enable_native and device.device == "cpu")
    memory = None
    if library is not None:
        notes = Notes(default_cache_root() / "starts")
        memory = Memory(notes, path, words, dtype, library)
        recalled = _load_recalled(config, path, memory, library, progress)
        if recalled is not None:
            return recalled
    from .model import load_model

    tokenizer = Tokenizer.load(words)
    model = load_model(path, getattr(torch, dtype), torch.device(device.device))
    resolved = config.resolve(model.facts, inspect_device(config.device))
    parts = _Parts(path, model, resolved, tokenizer, library)
    # Before the weights are packed: there is most memory then.
    shapes = memory.examine(model) if memory is not None else None
    runner = parts.runner()
    if memory is not None and shapes is not None and runner.proof is not None:
        memory.learn(model.facts, tokenizer, shapes, runner.proof)
    return parts.assemble(runner)


def _load_recalled(
    config: EngineConfig, path: Path, memory: Memory, library: Library, progress: Progress
) -> Loaded | None:
    """The model as an earlier start learnt to run it; None where none did, or it is not so now."""
    recalled = memory.recall(lambda share: progress(_STAGE, share))
    if recalled is None:
        return None
    model = recalled.model
    device = inspect_device(config.device)
    device = replace(device, free_bytes=max(0, device.free_bytes - model.size))
    resolved = config.resolve(model.facts, device)
    parts = _Parts(path, model, resolved, recalled.tokenizer, library)
    try:
        return parts.assemble(parts.runner())
    except EngineError:
        raise
    except (NotAsBefore, *UNREADABLE) as error:
        _LOG.info("%s is loaded with transformers again: %s", path, error)
        memory.forget()
        return None


def _load_shared(
    config: EngineConfig,
    path: Path,
    device: DeviceFacts,
    on_fault: Callable[[RankFailed], None],
) -> Loaded:
    """With transformers over several processes, this one among them."""
    from .parallel import Start

    tokenizer = Tokenizer.load(_tokenizer_folder(config, path))
    start = Start(config, path, device)
    with start.ranks() as ranks:
        model = start.load(ranks)
        resolved = config.resolve(start.facts, start.room(ranks), model.facts)
        ranks.configure(resolved)
        with ranks.following():
            parts = _Parts(path, model, resolved, tokenizer, _library(resolved.native))
            loaded = parts.assemble(parts.runner(ranks), ranks)
        ranks.watch(on_fault)
    return loaded


def _library(wanted: bool) -> Library | None:
    return build_library(default_cache_root() / "native") if wanted else None


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a core is made of.

    Args:
        path: the model's folder.
        model: the model.
        config: as decided.
        tokenizer: the model's.
        library: compiled code, if there is any.
    """

    path: Path
    model: LoadedModel | PreparedModel
    config: ResolvedConfig
    tokenizer: Tokenizer
    library: Library | None

    def runner(self, ranks: Ranks | None = None) -> ModelRunner:
        """What computes; tried out."""
        attention = choose_attention(self.config, self.model.facts, self.library)
        if ranks is None:
            return ModelRunner(self.model, self.config, attention, self.library)
        return ModelRunner(self.model, self.config, attention, self.library, lead=ranks.lead)

    def assemble(self, runner: Runner, ranks: Ranks | None = None) -> Loaded:
        """The core, and what belongs to it."""
        config, tokenizer = self.config, self.tokenizer
        resources = ExitStack()
        if ranks is not None:
            resources.callback(ranks.close)
        if config.overlap and config.device == "cpu":
            runner = background = BackgroundRunner(runner)
            resources.callback(background.close)
        images = _image_reader(self.path, self.model, tokenizer, config)
        if not isinstance(images, str):
            resources.callback(images.close)
        constraints = Constraints(lambda: _grammars(tokenizer, self.model.facts.vocab_size))
        resources.callback(constraints.close)
        profiler = Profiler()
        resources.callback(profiler.close)
        core = EngineCore(config, runner, tokenizer, constraints)
        return Loaded(core, constraints, tokenizer, config, images, profiler, resources)


def _grammars(tokenizer: Tokenizer, vocab_size: int) -> GrammarCompiler:
    from .grammar import GrammarCompiler

    return GrammarCompiler(tokenizer, vocab_size)


def choose_attention(
    config: ResolvedConfig, facts: ModelFacts, library: Library | None
) -> AttentionBackend:
    """The fastest implementation that runs here.

    Args:
        config: the device, and the threads to compute with.
        facts: what this process holds of the model.
        library: compiled code, if there is any.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.device == "cuda":
        return build_triton(dtype, facts) or TorchAttention()
    if library is not None and NativeAttention.takes(
        dtype, facts.num_heads, facts.num_kv_heads, facts.head_dim
    ):
        return NativeAttention(library, config.num_threads)
    return TorchAttention()


def _image_reader(
    path: Path,
    model: LoadedModel | PreparedModel,
    tokenizer: Tokenizer,
    config: ResolvedConfig,
) -> ImageReader | str:
    """What reads images, or why none can be read."""
    tower = None if isinstance(model, PreparedModel) else model.vision
    if tower is None:
        return f"the model {config.model_path!r} reads text only"
    try:
        import PIL.Image  # noqa: F401 - the processor needs it
    except ImportError:
        return "images are read with Pillow, which is not here: pip install 'asyncsgl[images]'"
    from .image_processor import ImageProcessor
    from .multimodal import ImageReader

    processor = ImageProcessor.load(path, config.max_image_pixels)
    token = processor.image_token
    if tokenizer.encode(token, add_special_tokens=False) != [tower.image_token_id]:
        raise ModelError(
            f"the tokenizer does not know {token!r}, which stands for images, as token "
            f"{tower.image_token_id}"
        )
    tokenizer.add_image_token(token, processor.chat_template)
    return ImageReader(tower, processor, tokenizer.encode, config)


def _tokenizer_folder(config: EngineConfig, model: Path) -> Path:
    if config.tokenizer_path is None:
        return model
    path = Path(config.tokenizer_path).expanduser()
    if not path.is_dir():
        raise ConfigError(f"tokenizer_path: {path} is not a folder")
    return path
