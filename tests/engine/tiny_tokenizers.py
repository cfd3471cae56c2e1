"""Small tokenizers of the usual families, built in memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from asyncsgl_engine.hub import DEFAULT_MODEL, resolve_model
from asyncsgl_engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and 12 dogs sleep.",
    "Zwölf große Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    "日本語の文章です。 東京は日本の首都です。",
    'naïve café 🙂👍🏽 {"key": [1, 2.5, true, null]}\n\tindented   spaces',
)
SPECIAL = ("<s>", "</s>", "<|user|>")


def _tokenizer(backend: Backend, **tokens: str) -> Tokenizer:
    """As transformers would load it; its constructor has no types."""
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return Tokenizer(wrap(tokenizer_object=backend, **tokens))


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: every token is bytes, no token is put before a text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("né", special=False)])
    return _tokenizer(backend, eos_token="</s>")


@cache
def sentencepiece() -> Tokenizer:
    """Llama's kind: spaces are ▁, unknown characters are spelled in bytes, `<s>` comes first."""
    trained = Backend(models.BPE())
    trained.normalizer = _metaspace()
    trained.train_from_iterator(CORPUS[:2], BpeTrainer(vocab_size=150, show_progress=False))
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    known = sorted(trained.get_vocab(), key=lambda piece: (len(piece), piece))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *known])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in known
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = _metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return _tokenizer(backend, bos_token="<s>", eos_token="</s>")


def _metaspace() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@cache
def metaspace() -> Tokenizer:
    """The newer spelling of the same idea: a Metaspace decoder that drops the first space."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _tokenizer(backend, unk_token="<unk>", eos_token="</s>")


@cache
def word_piece() -> Tokenizer:
    """BERT's kind: pieces that go on a word are marked, spaces are put between words."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = WordPieceTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, "[UNK]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _tokenizer(backend, unk_token="[UNK]", eos_token="</s>")


@cache
def smollm2() -> Tokenizer:
    """The default model's own."""
    return Tokenizer.load(resolve_model(DEFAULT_MODEL).path)


BUILT: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "word_piece": word_piece,
}
ALL: dict[str, Callable[[], Tokenizer]] = {**BUILT, "smollm2": smollm2}
