"""Text ⇄ token ids, by the model's own tokenizer."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import decoders
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .detokenizer import ByteDecoder, WindowDecoder
from .errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase

    from .detokenizer import IncrementalDecoder

__all__ = ["Tokenizer"]

_CHARS: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
_PROBE = "a probing word"
_BYTE_OF = {char: byte for byte, char in _CHARS.items()}


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads at once.

    Args:
        hf: a transformers tokenizer. Truncation and padding are switched off in it.
        eos_token_ids: tokens that end a sequence besides the tokenizer's own.
    """

    def __init__(self, hf: PreTrainedTokenizerBase, eos_token_ids: Iterable[int] = ()) -> None:
        self.hf = hf
        backend: Backend | None = getattr(hf, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend
        own: Any = hf.eos_token_id
        self._eos_token_ids = frozenset((*(() if own is None else (int(own),)), *eos_token_ids))
        self._special_ids = _special_ids(hf, backend)
        vocabulary = hf.get_vocab()
        self._byte_ids = _byte_ids(vocabulary)
        self._id_limit = max(vocabulary.values(), default=-1) + 1
        self._byte_level = backend is not None and isinstance(backend.decoder, decoders.ByteLevel)
        self._vocab_size = len(hf)
        self._image_token: str | None = None
        self._bytes_of = lru_cache(maxsize=None)(self._token_bytes)
        self._text_bytes_of = lru_cache(maxsize=None)(self._text_bytes)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load the tokenizer of a model folder.

        Args:
            path: folder with the tokenizer's files, and the model's generation_config.json or
                config.json, which may name more tokens that end a sequence.

        Raises:
            ModelError: there is no tokenizer, or it cannot be read.
        """
        try:
            hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelError(
                f"no tokenizer could be loaded from {path} ({type(error).__name__}: {error}). A "
                "folder needs tokenizer.json, or its older forms, beside config.json; set "
                "tokenizer_path when they are in another folder."
            ) from error
        return cls(hf, _end_tokens(path))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's logits may be wider."""
        return self._vocab_size

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja template for messages, if it has one."""
        template: Any = self.hf.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template if isinstance(template, str) else None

    @cached_property
    def template_wants_parts(self) -> bool:
        """Whether the template shows text only where it comes in a list of parts.

        Templates of models that read images often go through a message's parts, and show nothing
        of a message that is a text.
        """
        parts = [{"type": "text", "text": _PROBE}]
        return not self._shows(_PROBE) and self._shows(parts)

    def _shows(self, content: object) -> bool:
        turn: Any = [{"role": "user", "content": content}]
        try:
            return _PROBE in str(self.hf.apply_chat_template(turn, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
            return False

    def add_image_token(self, text: str, chat_template: str | None) -> None:
        """Take over what a model's processor knows and its tokenizer need not.

        Args:
            text: the token that stands for an image.
            chat_template: the template for messages, used if the tokenizer has none.
        """
        self._image_token = text
        self.__dict__.pop("template_wants_parts", None)
        if self.chat_template is None and chat_template is not None:
            self.hf.chat_template = chat_template

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens' texts by role (`bos_token`, `eos_token`, `image_token`, ...)."""
        tokens: dict[str, object] = dict(self.hf.special_tokens_map)
        if self._image_token is not None:
            tokens["image_token"] = self._image_token
        return MappingProxyType(
            {role: text for role, text in tokens.items() if isinstance(text, str)}
        )

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence, if there is one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the tokenizer's own end-of-sequence token, if there is one."""
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a text. Special tokens that are written out in it are recognised.

        Args:
            text: any text.
            add_special_tokens: whether to put the special tokens around it that the model
                expects; None does so unless the text begins with the begin token already, as
                the text of a chat template does.
        """
        if add_special_tokens is None:
            bos = self.bos_token
            add_special_tokens = not (bos and text.startswith(bos))
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return list(self.hf.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, with nothing cleaned up in it.

        Args:
            ids: token ids; ids outside of the vocabulary have no text.
            skip_special_tokens: leave special tokens out.
        """
        return self._decode(list(filter(self._keeps(skip_special_tokens), ids)))

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes that one token stands for, which may be part of a character.

        Args:
            token: a token id; one outside of the vocabulary has no bytes.
        """
        if self._byte_level:
            return self._bytes_of(token)
        if token in self._byte_ids:
            return bytes.fromhex(str(self.hf.convert_ids_to_tokens(token))[3:-1])  # <0xE4>
        return self.decode([token], skip_special_tokens=False).encode()

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one sequence whose tokens come bit by bit.

        Args:
            skip_special_tokens: leave special tokens out.
        """
        if self._byte_level:
            return ByteDecoder(self._text_bytes_of if skip_special_tokens else self._bytes_of)
        return WindowDecoder(
            self._decode, self._keeps(skip_special_tokens), self._byte_ids.__contains__
        )

    def _keeps(self, skip_special_tokens: bool) -> Callable[[int], bool]:
        limit = self._id_limit
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        return lambda token: 0 <= token < limit and token not in skipped

    def _decode(self, ids: Sequence[int]) -> str:
        if self._backend is not None:
            return self._backend.decode(ids, skip_special_tokens=False)
        return str(
            self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _token_bytes(self, token: int) -> bytes:
        assert self._backend is not None
        text = self._backend.id_to_token(token) if 0 <= token < self._id_limit else None
        if text is None:
            return b""
        try:
            return bytes([_BYTE_OF[char] for char in text])
        except KeyError:  # an added token, written as it is
            return text.encode()

    def _text_bytes(self, token: int) -> bytes:
        return b"" if token in self._special_ids else self._bytes_of(token)


def _special_ids(hf: PreTrainedTokenizerBase, backend: Backend | None) -> frozenset[int]:
    if backend is None:
        return frozenset(hf.all_special_ids)
    added = backend.get_added_tokens_decoder().items()
    return frozenset(token for token, content in added if content.special)


def _byte_ids(vocabulary: Mapping[str, int]) -> frozenset[int]:
    spelled = (vocabulary.get(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in spelled if token is not None)


def _end_tokens(path: Path) -> tuple[int, ...]:
    """What the model's files name as end tokens; transformers reads the same two."""
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if file.is_file():
            match json.loads(file.read_text("utf-8")).get("eos_token_id"):
                case int(token):
                    return (token,)
                case list(tokens):
                    return tuple(int(token) for token in tokens)
                case _:
                    return ()
    return ()
