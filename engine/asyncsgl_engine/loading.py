"""From a configuration to a core that is ready to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .attention import AttentionBackend, TorchAttention, build_triton
from .config import EngineConfig, ResolvedConfig
from .constraints import Constraints
from .core import EngineCore
from .device import inspect_device
from .errors import ConfigError, ModelError
from .grammar import GrammarCompiler
from .hub import resolve_model
from .hub.cache import default_cache_root
from .model import LoadedModel, load_model
from .multimodal import ImageReader
from .native import Library, NativeAttention, build_library
from .runner import ModelRunner
from .tokenizer import Tokenizer

__all__ = ["Loaded", "Progress", "load"]

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A core and what it was made of.

    Args:
        images: reads images, or why there are none to be read.
    """

    core: EngineCore
    constraints: Constraints
    tokenizer: Tokenizer
    config: ResolvedConfig
    images: ImageReader | str


def load(config: EngineConfig, progress: Progress) -> Loaded:
    """Find, load and connect everything; blocks for as long as that takes.

    Args:
        config: as asked for.
        progress: called with a stage and the share of it that is done (None: unknown).

    Raises:
        ModelError: the model or its tokenizer cannot be found or loaded.
        ConfigError: the settings do not fit the model or the machine.
    """
    found = resolve_model(config.model_path, progress=progress)
    progress("Loading the model", None)
    device = inspect_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokenizer = Tokenizer.load(_tokenizer_folder(config, found.path))
    model = load_model(
        found.path, getattr(torch, config.resolve_dtype(device)), torch.device(device.device)
    )
    resolved = config.resolve(model.facts, inspect_device(config.device))
    library = build_library(default_cache_root() / "native") if resolved.native else None
    runner = ModelRunner(model, resolved, choose_attention(resolved, library), library)
    constraints = Constraints(lambda: GrammarCompiler(tokenizer, model.facts.vocab_size))
    core = EngineCore(resolved, runner, tokenizer, constraints)
    images = _image_reader(found.path, model, tokenizer, resolved)
    progress("Loading the model", 1.0)
    return Loaded(core, constraints, tokenizer, resolved, images)


def choose_attention(config: ResolvedConfig, library: Library | None) -> AttentionBackend:
    """The fastest implementation that runs here.

    Args:
        library: compiled code, if there is any.
    """
    facts = config.model
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
