"""GGUF file → folder of config, safetensors and tokenizer, by transformers in a helper process.

The helper keeps the conversion's memory, its progress bars and its log away from the caller, and
a crash in it is an error here. It is this same module, run with `-m`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .child import run_child

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .cache import Progress

__all__ = ["convert_gguf"]

_log = logging.getLogger(__name__)

# Vocabularies whose merges were learned on text with every digit cut off by itself; the names are
# llama.cpp's (`tokenizer.ggml.pre`). transformers' GGUF reader does not know them.
_SINGLE_DIGITS = frozenset(
    ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")
)
# Names that mean GPT-2's own split, which is what transformers falls back to.
_GPT2_SPLIT = frozenset(("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"))
_SAMPLES = (
    "Hello world",
    "  two spaces\n\nand 2024 things",
    "naïve 日本語 🙂",
    "<|im_start|>user\n",
)


def convert_gguf(source: Path, target: Path, *, name: str, progress: Progress) -> None:
    """Turn a GGUF file into a model folder that `from_pretrained` loads.

    Quantized weights are unpacked to bfloat16; float weights keep their type.

    Args:
        source: the `.gguf` file.
        target: the folder to make.
        name: what the model is called in errors and in its config.
        progress: told the stages.

    Raises:
        ModelError: the file is no GGUF, or transformers cannot convert it.
        OSError: the disk is full.
    """
    reported: dict[str, str] = {}

    def claim(line: str) -> bool:
        with contextlib.suppress(ValueError):
            match json.loads(line):
                case {"stage": str(stage), "fraction": float(fraction)}:
                    progress(stage, fraction)
                    return True
                case {"warning": str(text)}:
                    _log.warning("%s: %s", name, text)
                    return True
                case {"error": str(text)}:
                    reported["error"] = text
        return False

    command = (sys.executable, "-P", "-m", __spec__.name, str(source), str(target), name)
    result = run_child(command, cwd=target.parent, environment=_environment(), claim=claim)
    if result.status == 0:
        return
    if result.disk_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    problem = reported.get("error") or " | ".join(result.tail[-3:]) or "it said nothing"
    if result.status < 0:
        problem = "was it out of memory? The model must fit in memory once to be converted"
    raise ModelError(f"cannot convert {source} ({name}): the converter {result.ending}: {problem}")


def _environment() -> dict[str, str]:
    package_home = Path(__file__).resolve().parents[2]
    paths = (str(package_home), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",  # everything is in the file
        "CUDA_VISIBLE_DEVICES": "",
        "TRANSFORMERS_VERBOSITY": "error",
    }


# ---- in the helper process ----


def _tell(**message: object) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201 - the pipe to the caller


def _convert(source: Path, target: Path, name: str) -> None:
    _tell(stage="converting: loading transformers", fraction=0.05)
    from transformers import AutoConfig
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(source))
    _tell(stage="converting: tokenizer", fraction=0.2)
    tokenizer = _tokenizer(source, metadata)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.name_or_path = name
    with contextlib.suppress(AttributeError):
        tokenizer.model_max_length = config.max_position_embeddings
    _tell(stage="converting: weights", fraction=0.4)
    model = _model(source, config)
    model.generation_config.eos_token_id = _end_tokens(metadata)
    _tell(stage="converting: saving", fraction=0.9)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _check_tokenizer(target, tokenizer)
    mode = (target / "config.json").stat().st_mode
    for file in target.iterdir():
        file.chmod(mode)  # safetensors' writer leaves 0600; a cache may be shared
    _tell(stage="converting: saving", fraction=1.0)


def _tokenizer(source: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        source.parent, gguf_file=source.name
    )
    split = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer
    if split in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif split not in _GPT2_SPLIT and split not in GGUF_PRE_TOKENIZER_SPLITS:
        _tell(
            warning=f"its way to split text ({split!r}) is unknown, so text may be cut into other "
            "tokens than in training; a folder with the model's own tokenizer.json has none of this"
        )
    return tokenizer


def _model(source: Path, config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.integrations.gguf.reader import GgufHeader

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        config=config,
        dtype=GgufHeader.from_file(str(source)).dtype or torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, loading = loaded
    for fault in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading.get(fault):
            raise ValueError(f"the file does not fit the model class: {fault} {loading[fault]}")
    return model


def _end_tokens(metadata: dict[str, Any]) -> int | list[int] | None:
    """The tokens that end a sequence: of the text, of a turn, of a message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = {metadata.get(f"tokenizer.ggml.{key}") for key in keys} - {None}
    ids = sorted(int(token) for token in found if token is not None)
    return ids[0] if len(ids) == 1 else ids or None


def _check_tokenizer(target: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    for text in _SAMPLES:
        if saved(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ValueError(f"the saved tokenizer encodes {text!r} in another way than the file's")


def _end_with_caller() -> None:
    sys.stdin.read()  # returns when the caller is gone
    os._exit(1)


def _main(source: str, target: str, name: str) -> int:
    threading.Thread(target=_end_with_caller, daemon=True).start()
    try:
        _convert(Path(source), Path(target), name)
    except Exception as error:  # noqa: BLE001 - it crosses to the caller as a message
        _tell(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
