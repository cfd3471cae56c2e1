"""What was asked for, what the model and the machine are, and what follows from both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .errors import ConfigError

__all__ = ["DeviceFacts", "EngineConfig", "ModelFacts", "ProfileOptions", "ResolvedConfig"]

DTypeName = Literal["float32", "bfloat16", "float16"]

_DTYPES: dict[str, DTypeName] = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine must know of a model to plan for it.

    Args:
        architecture: class name, for messages.
        num_layers: layers with attention.
        num_heads: query heads in a layer.
        num_kv_heads: key/value heads in a layer.
        head_dim: elements of a head.
        vocab_size: rows of the output layer.
        context_length: most positions the model was made for.
        weight_dtype: how the weights are stored.
        model_type: the kind of model, as its config.json names it; empty if not known.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    weight_dtype: str
    model_type: str = ""

    def shard(self, size: int) -> ModelFacts:
        """What one of `size` tensor-parallel ranks holds of the model's heads.

        Key/value heads that are fewer than the ranks are held by several of them.

        Raises:
            ConfigError: the heads cannot be divided so.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % size:
            raise ConfigError(
                f"tp_size: {size} does not divide {heads} attention heads of {self.architecture}"
            )
        if kv_heads % size and size % kv_heads:
            raise ConfigError(
                f"tp_size: {size} neither divides the {kv_heads} key/value heads of "
                f"{self.architecture} nor is a multiple of them"
            )
        return replace(self, num_heads=heads // size, num_kv_heads=max(1, kv_heads // size))


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the engine must know of the machine.

    Args:
        device: `cpu` or `cuda`.
        free_bytes: memory that may be used.
        fast_bfloat16: whether matrix products in bfloat16 beat float32.
        threads: cores to compute on.
    """

    device: str
    free_bytes: int
    fast_bfloat16: bool
    threads: int


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings as asked for, named as SGLang's server arguments.

    Args:
        model_path: the default model's name, a Hugging Face id, a folder or a .gguf file.
        tokenizer_path: another place for the tokenizer.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; auto is bfloat16 where the
            processor multiplies it natively and float32 elsewhere.
        device: `auto`, `cpu` or `cuda`.
        page_size: tokens in a page of the KV cache.
        max_total_tokens: tokens the KV cache holds; by default what the memory share gives.
        mem_fraction_static: share of free memory for the KV cache, in (0, 1).
        max_running_requests: sequences in a step at most.
        chunked_prefill_size: tokens computed in a step at most; -1 never splits a prompt.
        context_length: most tokens in a sequence; by default the model's.
        max_queued_requests: requests waiting at most before `Overloaded`.
        disable_radix_cache: share no prefixes.
        random_seed: seeds requests that bring no seed.
        debug_check: prove the books after every step.
        num_threads: threads for tensor work; by default the cores this process may use.
        enable_native: use the compiled CPU attention kernel where a C compiler is found.
        disable_cuda_graph: launch every operation of a decoding step on its own.
        cuda_graph_max_bs: most sequences in a step that is replayed as a CUDA graph.
        max_images: images in a prompt at most.
        max_image_pixels: width times height of an image at most.
        image_memory: bytes of images' embeddings in main memory at most, those of images that
            may come again included.
        tp_size: processes that share the model's tensors, each on a GPU of its own or, on
            processors, with its share of the cores.
        watchdog_timeout: seconds that a step of these processes may take before the engine
            gives up, as one of them hangs.
        disable_overlap_schedule: plan a step only when the one before it is done. By default so
            on processors and with several ranks; else a step is planned, and the one before it
            is taken in, during the forward pass.

    Raises:
        ConfigError: a setting is out of its range.
    """

    model_path: str = "smollm2-135m-instruct"
    tokenizer_path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    page_size: int = 16
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    max_running_requests: int | None = None
    chunked_prefill_size: int | None = None
    context_length: int | None = None
    max_queued_requests: int = 100_000
    disable_radix_cache: bool = False
    random_seed: int = 0
    debug_check: bool = False
    num_threads: int | None = None
    enable_native: bool = True
    disable_cuda_graph: bool = False
    cuda_graph_max_bs: int = 256
    max_images: int = 32
    max_image_pixels: int = 64_000_000
    image_memory: int = 1 << 30
    tp_size: int = 1
    watchdog_timeout: float = 300.0
    disable_overlap_schedule: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *_DTYPES):
            raise ConfigError(f"dtype: {self.dtype!r} is not one of auto, {', '.join(_DTYPES)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device: {self.device!r} is not one of auto, cpu, cuda")
        for name in (
            *("page_size", "max_queued_requests", "cuda_graph_max_bs", "tp_size"),
            *("max_images", "max_image_pixels", "image_memory"),
        ):
            self._at_least_one(name)
        for name in (
            "max_total_tokens",
            "max_running_requests",
            "context_length",
            "num_threads",
        ):
            if getattr(self, name) is not None:
                self._at_least_one(name)
        if self.chunked_prefill_size not in (None, -1):
            self._at_least_one("chunked_prefill_size")
        share = self.mem_fraction_static
        if share is not None and not 0.0 < share < 1.0:
            raise ConfigError(f"mem_fraction_static: must be in (0, 1), not {share!r}")
        if self.tp_size > 1 and self.disable_overlap_schedule is False:
            raise ConfigError(
                "disable_overlap_schedule: must be left out or true with tp_size > 1: the other "
                "ranks do not know drawn tokens before they are told"
            )
        if not self.watchdog_timeout > 0.0:
            raise ConfigError(f"watchdog_timeout: must be above 0, not {self.watchdog_timeout!r}")

    def _step_tokens(self, device: DeviceFacts, pages: int) -> int:
        """Tokens of a step at most; -1 lets in as many as the cache can hold."""
        if self.chunked_prefill_size == -1:
            return pages * self.page_size
        return self.chunked_prefill_size or _chunk(device)

    def _at_least_one(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}: must be a whole number >= 1, not {value!r}")

    def resolve_dtype(self, device: DeviceFacts) -> DTypeName:
        """The element type for weights and cache on `device`."""
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        return "bfloat16" if device.fast_bfloat16 else "float32"

    def threads_of_rank(self, device: DeviceFacts) -> int:
        """The threads that one of the tensor-parallel processes computes with."""
        return max(1, (self.num_threads or device.threads) // self.tp_size)

    def resolve(
        self, model: ModelFacts, device: DeviceFacts, shard: ModelFacts | None = None
    ) -> ResolvedConfig:
        """Decide everything that was left open.

        Args:
            model: of the model that is loaded.
            device: of the machine, with the model already in its memory.
            shard: what one tensor-parallel rank holds of the model; by default all of it.

        Raises:
            ConfigError: the settings do not fit the model or the machine.
        """
        dtype = self.resolve_dtype(device)
        on_cpu = device.device == "cpu"
        context = self._context(model)
        part = shard or model
        token_bytes = 2 * part.num_layers * part.num_kv_heads * part.head_dim
        token_bytes *= _ELEMENT_BYTES[dtype]
        pages = self._pages(token_bytes, device)
        running = self.max_running_requests or (128 if on_cpu else 256)
        graphs = not (on_cpu or self.disable_cuda_graph or self.tp_size > 1)
        apart = self.disable_overlap_schedule
        if apart is None:
            apart = on_cpu or self.tp_size > 1
        return ResolvedConfig(
            model_path=self.model_path,
            model=model,
            device=device.device,
            dtype=dtype,
            page_size=self.page_size,
            num_pages=pages,
            kv_bytes=pages * self.page_size * token_bytes,
            max_total_tokens=pages * self.page_size,
            max_running_requests=running,
            chunked_prefill_size=self._step_tokens(device, pages),
            context_length=context,
            max_queued_requests=self.max_queued_requests,
            radix_cache=not self.disable_radix_cache,
            random_seed=self.random_seed,
            debug_check=self.debug_check,
            num_threads=self.threads_of_rank(device),
            native=self.enable_native and on_cpu,
            cuda_graph_max_bs=min(self.cuda_graph_max_bs, running) if graphs else 0,
            max_images=self.max_images,
            max_image_pixels=self.max_image_pixels,
            image_memory=self.image_memory,
            tp_size=self.tp_size,
            overlap=not apart,
        )

    def _context(self, model: ModelFacts) -> int:
        asked = self.context_length
        if asked is not None and asked > model.context_length:
            raise ConfigError(
                f"context_length: {asked} is more than the {model.context_length} positions "
                f"{model.architecture} was made for"
            )
        return asked or model.context_length

    def _pages(self, token_bytes: int, device: DeviceFacts) -> int:
        if self.max_total_tokens is not None:
            pages = self.max_total_tokens // self.page_size
            if pages < 1:
                raise ConfigError(
                    f"max_total_tokens: {self.max_total_tokens} is less than one page of "
                    f"{self.page_size}"
                )
            return pages
        ranks = self.tp_size if device.device == "cpu" else 1  # that share this memory
        if self.mem_fraction_static is not None:
            budget = int(device.free_bytes * self.mem_fraction_static) // ranks
        elif device.device == "cpu":
            budget = min(device.free_bytes // 4, _GIB) // ranks
        else:
            budget = int(device.free_bytes * 0.85)
        pages = budget // (token_bytes * self.page_size)
        if pages < 1:
            raise ConfigError(
                f"{device.free_bytes >> 20} MiB of free memory leave no room for a KV cache; "
                "set max_total_tokens or free some memory"
            )
        return pages


def _chunk(device: DeviceFacts) -> int:
    """Tokens of a step: what a step computes for them takes memory that the cache leaves free."""
    if device.device == "cpu":
        return 512
    return 8192 if device.free_bytes >= 32 * _GIB else 2048


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Settings as decided; see `EngineConfig` for those of the same name.

    Args:
        model: facts of the loaded model.
        num_pages: pages of the KV cache.
        kv_bytes: memory that each rank sets aside for it (touched only as it fills).
        radix_cache: whether prefixes are shared.
        num_threads: of each rank.
        native: whether the compiled CPU kernel may be used.
        cuda_graph_max_bs: 0 for no graphs.
        tp_size: processes that share the model's tensors.
        overlap: whether a step is planned while the one before it is computed.
    """

    model_path: str
    model: ModelFacts
    device: str
    dtype: DTypeName
    page_size: int
    num_pages: int
    kv_bytes: int
    max_total_tokens: int
    max_running_requests: int
    chunked_prefill_size: int
    context_length: int
    max_queued_requests: int
    radix_cache: bool
    random_seed: int
    debug_check: bool
    num_threads: int
    native: bool
    cuda_graph_max_bs: int = 0
    max_images: int = 32
    max_image_pixels: int = 64_000_000
    image_memory: int = 1 << 30
    tp_size: int = 1
    overlap: bool = False

    @property
    def sequence_limit(self) -> int:
        """Most tokens one sequence may reach, prompt and output together."""
        return min(self.context_length, self.max_total_tokens)


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What a profile records.

    Args:
        with_stack: the Python lines operations come from, which slows them down.
        record_shapes: the shapes of their tensors.
        memory: what they allocate.
    """

    with_stack: bool = False
    record_shapes: bool = False
    memory: bool = False
