"""A choice among texts, one token at a time, for services that can only be biased."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

__all__ = ["TokenWalk", "Tokenizer", "known_tokenizer"]


class Tokenizer(Protocol):
    """What a walk needs of a model's tokenizer; tiktoken's encodings have it."""

    @property
    def eot_token(self) -> int:
        """The token that ends texts."""
        ...

    def encode(self, text: str, /) -> Sequence[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int], /) -> str:
        """The text of tokens."""
        ...


class TokenWalk:
    """Follows the tokens of several texts from where they part until one is left.

    The model is asked only where the texts part. Where one of them ends and another goes on,
    the end of the text is an option, too. The method is that of SGLang's OpenAI backend
    (``select`` in ``lang/backend/openai.py``), on the tokens of prompt and choice together,
    so that a choice may share a token with the prompt.

    Args:
        texts: the prompt with each choice after it; at least one.
        tokenizer: the model's.

    Attributes:
        prefix: the tokens before the next step.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        end = tokenizer.eot_token
        self._left = {at: [*tokenizer.encode(text), end] for at, text in enumerate(texts)}
        self._decode = tokenizer.decode
        self._end = end
        self.prefix: list[int] = []
        self._advance()

    @property
    def decision(self) -> int | None:
        """Which text is left; the first of several that are the same; None if they part."""
        return next(iter(self._left)) if len(self._options()) < 2 else None

    def options(self) -> dict[int, str]:
        """The tokens that may come next, each with its text; the end has none."""
        return {
            token: "" if token == self._end else self._decode([token]) for token in self._options()
        }

    def take(self, text: str) -> bool:
        """Follow the option with this text; False if there is no such one."""
        token = next((token for token, said in self.options().items() if said == text), None)
        if token is None:
            return False
        at = len(self.prefix)
        self._left = {n: tokens for n, tokens in self._left.items() if tokens[at] == token}
        self._advance()
        return True

    def _options(self) -> list[int]:
        at = len(self.prefix)
        found = (tokens[at] for tokens in self._left.values() if at < len(tokens))
        return list(dict.fromkeys(found))

    def _advance(self) -> None:
        while len(options := self._options()) == 1:
            self.prefix.append(options[0])


def known_tokenizer(model: str) -> Tokenizer | None:
    """The encoding that tiktoken has for ``model``; None if it has none or cannot load it.

    It may have to be fetched from the network: call this in a thread.
    """
    try:
        encoding: Any = import_module("tiktoken").encoding_for_model(model)
    except (ImportError, LookupError, OSError):
        return None
    return _Ordinary(encoding)


class _Ordinary:
    """An encoding that takes the names of special tokens for what they are in a prompt: text."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    @property
    def eot_token(self) -> int:
        return int(self._encoding.eot_token)

    def encode(self, text: str, /) -> Sequence[int]:
        return list(self._encoding.encode_ordinary(text))

    def decode(self, tokens: Sequence[int], /) -> str:
        return str(self._encoding.decode(list(tokens)))
