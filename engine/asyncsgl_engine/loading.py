"""From a configuration to a core that is ready to step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from .attention import AttentionBackend, TorchAttention, build_triton
from .background import BackgroundRunner
from .config import DeviceFacts, EngineConfig, ModelFacts, ResolvedConfig
from .constraints import Constraints
from .core import EngineCore
from .device import inspect_device
from .errors import ConfigError, ModelError, RankFailed
from .grammar import GrammarCompiler
from .hub import resolve_model
from .hub.cache import default_cache_root
from .model import LoadedModel, load_model
from .multimodal import ImageReader
from .native import Library, NativeAttention, build_library
from .parallel import Ranks, Start
from .plan import Runner
from .profiling import Profiler
from .runner import ModelRunner
from .tokenizer import Tokenizer

__all__ = ["Loaded", "Progress", "load"]

Progress = Callable[[str, float | None], None]


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
    config: EngineConfig, progress: Progress, on_fault: Callable[[RankFailed], None]
) -> Loaded:
    """Find, load and connect everything; blocks for as long as that takes.

    Args:
        config: as asked for.
        progress: called with a stage and the share of it that is done (None: unknown).
        on_fault: called, on another thread, when a tensor-parallel rank ends or hangs.

    Raises:
        ModelError: the model or its tokenizer cannot be found or loaded.
        ConfigError: the settings do not fit the model or the machine.
        RankFailed: a tensor-parallel rank could not load its part.
    """
    found = resolve_model(config.model_path, progress=progress)
    progress("Loading the model", None)
    device = inspect_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokenizer = Tokenizer.load(_tokenizer_folder(config, found.path))
    if config.tp_size > 1:
        loaded = _load_shared(config, found.path, device, tokenizer, on_fault)
    else:
        dtype: torch.dtype = getattr(torch, config.resolve_dtype(device))
        model = load_model(found.path, dtype, torch.device(device.device))
        resolved = config.resolve(model.facts, inspect_device(config.device))
        loaded = _assemble(found.path, model, resolved, tokenizer)
    progress("Loading the model", 1.0)
    return loaded


def _load_shared(
    config: EngineConfig,
    path: Path,
    device: DeviceFacts,
    tokenizer: Tokenizer,
    on_fault: Callable[[RankFailed], None],
) -> Loaded:
    """The same over several processes, this one among them."""
    start = Start(config, path, device)
    with start.ranks() as ranks:
        model = start.load(ranks)
        resolved = config.resolve(start.facts, start.room(ranks), model.facts)
        ranks.configure(resolved)
        with ranks.following():
            loaded = _assemble(path, model, resolved, tokenizer, ranks)
        ranks.watch(on_fault)
    return loaded


def _assemble(
    path: Path,
    model: LoadedModel,
    config: ResolvedConfig,
    tokenizer: Tokenizer,
    ranks: Ranks | None = None,
) -> Loaded:
    library = build_library(default_cache_root() / "native") if config.native else None
    attention = choose_attention(config, model.facts, library)
    resources = ExitStack()
    runner: Runner
    if ranks is None:
        runner = ModelRunner(model, config, attention, library)
    else:
        runner = ModelRunner(model, config, attention, library, lead=ranks.lead)
        resources.callback(ranks.close)
    if config.overlap and config.device == "cpu":
        runner = background = BackgroundRunner(runner)
        resources.callback(background.close)
    images = _image_reader(path, model, tokenizer, config)
    if not isinstance(images, str):
        resources.callback(images.close)
    constraints = Constraints(lambda: GrammarCompiler(tokenizer, model.facts.vocab_size))
    resources.callback(constraints.close)
    profiler = Profiler()
    resources.callback(profiler.close)
    core = EngineCore(config, runner, tokenizer, constraints)
    return Loaded(core, constraints, tokenizer, config, images, profiler, resources)


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
    path: Path, model: LoadedModel, tokenizer: Tokenizer, config: ResolvedConfig
) -> ImageReader | str:
    """What reads images, or why none can be read."""
    tower = model.vision
    if tower is None:
        return f"the model {config.model_path!r} reads text only"
    try:
        import PIL.Image  # noqa: F401 - the processor needs it
    except ImportError:
        return "images are read with Pillow, which is not here: pip install 'asyncsgl[images]'"
    from .image_processor import ImageProcessor

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
