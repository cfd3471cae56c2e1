"""What there is to a tokenizer besides the splitting of texts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizerTraits", "chat_template_of"]


@dataclass(frozen=True, slots=True)
class TokenizerTraits:
    """As transformers reads them from a model's files.

    Args:
        eos_token_ids: tokens that end a sequence.
        special_ids: tokens that are no text.
        byte_ids: tokens that are spelled as a byte, as in `<0xE4>`.
        id_limit: above the highest id.
        vocab_size: how many tokens there are, added ones included.
        special_tokens: their texts by role.
        chat_template: for messages, in the Jinja language.
    """

    eos_token_ids: frozenset[int]
    special_ids: frozenset[int]
    byte_ids: frozenset[int]
    id_limit: int
    vocab_size: int
    special_tokens: Mapping[str, str]
    chat_template: str | None

    @classmethod
    def of(cls, hf: PreTrainedTokenizerBase, backend: Backend | None, ends: Iterable[int]) -> Self:
        """The traits of a tokenizer of transformers.

        Args:
            hf: the tokenizer.
            backend: of the library tokenizers, if it has one.
            ends: tokens that end a sequence besides the tokenizer's own.
        """
        own: Any = hf.eos_token_id
        vocabulary = hf.get_vocab()
        tokens: dict[str, object] = dict(hf.special_tokens_map)
        return cls(
            eos_token_ids=frozenset((*(() if own is None else (int(own),)), *ends)),
            special_ids=_special_ids(hf, backend),
            byte_ids=_byte_ids(vocabulary),
            id_limit=max(vocabulary.values(), default=-1) + 1,
            vocab_size=len(hf),
            special_tokens={role: text for role, text in tokens.items() if isinstance(text, str)},
            chat_template=chat_template_of(hf),
        )

    def as_json(self) -> str:
        """In one line."""
        return json.dumps(asdict(self), default=sorted)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What `as_json` gave.

        Raises:
            ValueError: it is something else.
        """
        match json.loads(text):
            case {
                "eos_token_ids": list(ends),
                "special_ids": list(special),
                "byte_ids": list(spelled),
                "id_limit": int(id_limit),
                "vocab_size": int(vocab_size),
                "special_tokens": dict(tokens),
                "chat_template": str() | None as template,
            }:
                ids = _ids(ends), _ids(special), _ids(spelled)
                return cls(ids[0], ids[1], ids[2], id_limit, vocab_size, tokens, template)
        raise ValueError("no traits of a tokenizer")


def _ids(given: Iterable[int]) -> frozenset[int]:
    return frozenset(map(int, given))


def chat_template_of(hf: PreTrainedTokenizerBase) -> str | None:
    """The Jinja template for messages, the default one of several."""
    template: Any = hf.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _special_ids(hf: PreTrainedTokenizerBase, backend: Backend | None) -> frozenset[int]:
    if backend is None:
        return frozenset(hf.all_special_ids)
    added = backend.get_added_tokens_decoder().items()
    return frozenset(token for token, content in added if content.special)


def _byte_ids(vocabulary: Mapping[str, int]) -> frozenset[int]:
    spelled = (vocabulary.get(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in spelled if token is not None)
