"""Text ⇄ token ids, by the model's own tokenizer."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from .detokenizer import ByteDecoder, WindowDecoder
from .errors import ModelError
from .tokenizer_traits import TokenizerTraits, chat_template_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from .detokenizer import IncrementalDecoder

__all__ = ["KeptTokenizer", "Tokenizer"]

_PROBE = "a probing word"


class KeptTokenizer:
    """A tokenizer as an earlier start left it: without transformers, whose import takes long.

    Args:
        path: the folder it was loaded from.
        kept: what `Tokenizer.keep` gave.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, path: Path, kept: bytes) -> None:
        traits, _, backend = kept.partition(b"\n")
        self.path = path
        self.traits = TokenizerTraits.from_json(traits)
        try:
            self.backend = Backend.from_buffer(backend)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"no tokenizer: {error}") from error


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads at once.

    Args:
        source: a transformers tokenizer, or one that was kept. Truncation and padding are
            switched off in it.
        eos_token_ids: tokens that end a sequence besides the tokenizer's own.
    """

    def __init__(
        self, source: PreTrainedTokenizerBase | KeptTokenizer, eos_token_ids: Iterable[int] = ()
    ) -> None:
        if isinstance(source, KeptTokenizer):
            self._hf: PreTrainedTokenizerBase | None = None
            self._path: Path | None = source.path
            self._backend: Backend | None = source.backend
            self._traits = source.traits
        else:
            self._hf, self._path = source, None
            self._backend = getattr(source, "backend_tokenizer", None)
            self._traits = TokenizerTraits.of(source, self._backend, eos_token_ids)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        decoder = None if self._backend is None else self._backend.decoder
        self._byte_level = isinstance(decoder, decoders.ByteLevel)
        self._image_token: str | None = None
        self._reading = Lock()
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
        return cls(_read(path), _end_tokens(path))

    def keep(self) -> bytes | None:
        """What a `KeptTokenizer` is made of; None where this cannot be kept."""
        if self._backend is None:
            return None
        return f"{self._traits.as_json()}\n{self._backend.to_str()}".encode()

    @property
    def hf(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer. Of a kept one it is read when it is first asked for.

        That takes a second. What is changed in it changes nothing here but the chat template.
        """
        with self._reading:
            if self._hf is None:
                assert self._path is not None, "a tokenizer has one source or the other"
                self._hf = _read(self._path)
            return self._hf

    @property
    def whole(self) -> bool:
        """Whether `hf` is there at once."""
        return self._hf is not None

    @property
    def backend_json(self) -> str | None:
        """How texts are split, in the format of `tokenizer.json`; None for a slow tokenizer."""
        return None if self._backend is None else self._backend.to_str()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        return self._traits.eos_token_ids

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's logits may be wider."""
        return self._traits.vocab_size

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja template for messages, if it has one."""
        return self._traits.chat_template if self._hf is None else chat_template_of(self._hf)

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
        tokens = dict(self._traits.special_tokens)
        if self._image_token is not None:
            tokens["image_token"] = self._image_token
        return MappingProxyType(tokens)

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
        if token in self._traits.byte_ids:
            spelled = self._backend.id_to_token(token) if self._backend is not None else None
            spelled = spelled or str(self.hf.convert_ids_to_tokens(token))
            return bytes.fromhex(spelled[3:-1])  # <0xE4>
        return self.decode([token], skip_special_tokens=False).encode()

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one sequence whose tokens come bit by bit.

        Args:
            skip_special_tokens: leave special tokens out.
        """
        if self._byte_level:
            return ByteDecoder(self._text_bytes_of if skip_special_tokens else self._bytes_of)
        return WindowDecoder(
            self._decode, self._keeps(skip_special_tokens), self._traits.byte_ids.__contains__
        )

    def _keeps(self, skip_special_tokens: bool) -> Callable[[int], bool]:
        limit = self._traits.id_limit
        skipped = self._traits.special_ids if skip_special_tokens else frozenset[int]()
        return lambda token: 0 <= token < limit and token not in skipped

    def _decode(self, ids: Sequence[int]) -> str:
        if self._backend is not None:
            return self._backend.decode(ids, skip_special_tokens=False)
        return str(
            self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _token_bytes(self, token: int) -> bytes:
        assert self._backend is not None
        text = self._backend.id_to_token(token) if 0 <= token < self._traits.id_limit else None
        if text is None:
            return b""
        try:
            return bytes([_BYTE_OF[char] for char in text])
        except KeyError:  # an added token, written as it is
            return text.encode()

    def _text_bytes(self, token: int) -> bytes:
        return b"" if token in self._traits.special_ids else self._bytes_of(token)


def _bytes_by_character() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (Radford et al. 2019).

    Those that can be seen stand for themselves, the others for the characters from U+0100 on.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    stand_ins = {chr(0x100 + place): byte for place, byte in enumerate(unseen)}
    return {chr(byte): byte for byte in seen} | stand_ins


_BYTE_OF = _bytes_by_character()


def _read(path: Path) -> PreTrainedTokenizerBase:
    try:
        from transformers import AutoTokenizer

        hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {path} ({type(error).__name__}: {error}). A "
            "folder needs tokenizer.json, or its older forms, beside config.json; set "
            "tokenizer_path when they are in another folder."
        ) from error
    return hf


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
