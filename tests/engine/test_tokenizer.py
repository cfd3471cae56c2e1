"""Encoding, decoding, and decoding bit by bit, for each family of tokenizers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from asyncsgl_engine.detokenizer import WindowDecoder
from asyncsgl_engine.errors import ModelError
from asyncsgl_engine.hub import DEFAULT_MODEL, resolve_model
from asyncsgl_engine.tokenizer import KeptTokenizer, Tokenizer
from tests.engine.tiny_tokenizers import ALL, BUILT, byte_level, sentencepiece, smollm2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# The first test that needs the default model may have to fetch it.
pytestmark = pytest.mark.timeout(300)

NAMES = st.sampled_from(sorted(ALL))
TEXTS = st.text(max_size=60) | st.sampled_from(
    ["naïve 日本語 🙂👍🏽", "  two  spaces ", "\n\n", "<|user|>hi</s>", "𒀀𒀁 ܐܒܓ ខ្មែរ", "é" * 20]
)


@st.composite
def id_lists(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Any tokens at all, also ones that make no valid text, and ids that do not exist."""
    name = draw(NAMES)
    size = ALL[name]().vocab_size
    ids = st.integers(0, size - 1) | st.integers(0, min(size, 300) - 1) | st.just(size + 7)
    return name, draw(st.lists(ids, max_size=40))


def chunks(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in pairwise(places)]


@given(id_lists(), st.lists(st.integers(0, 1000), max_size=20), st.booleans())
def test_pushes_add_up_to_the_whole_text(
    case: tuple[str, list[int]], cuts: list[int], skip: bool
) -> None:
    name, ids = case
    tokenizer = ALL[name]()
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(chunk) for chunk in chunks(ids, cuts)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@given(id_lists(), st.booleans())
def test_token_by_token_adds_up_to_the_whole_text(case: tuple[str, list[int]], skip: bool) -> None:
    name, ids = case
    tokenizer = ALL[name]()
    stream = tokenizer.stream(skip_special_tokens=skip)
    text = "".join(stream.push([token]) for token in ids) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@given(id_lists(), st.booleans())
def test_decode_is_what_transformers_decodes(case: tuple[str, list[int]], skip: bool) -> None:
    name, ids = case
    tokenizer = ALL[name]()
    expected = tokenizer.hf.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(st.sampled_from(["byte_level", "sentencepiece", "smollm2"]), TEXTS)
def test_no_push_ends_within_a_character(name: str, text: str) -> None:
    tokenizer = ALL[name]()
    ids = tokenizer.encode(text)
    # Some vocabularies cannot spell all there is: smollm2's lacks the bytes of rare planes.
    assume("\ufffd" not in tokenizer.decode(ids, skip_special_tokens=False))
    stream = tokenizer.stream(skip_special_tokens=False)
    assert "\ufffd" not in "".join(stream.push([token]) for token in ids)


@given(TEXTS)
def test_byte_level_texts_come_back_unchanged(text: str) -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_an_unfinished_character_comes_at_the_end_only() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a𒀀")
    stream = tokenizer.stream()
    assert [stream.push([token]) for token in ids[:-1]] == ["a", "", "", ""][: len(ids) - 1]
    assert stream.flush() == "\ufffd"


def test_a_run_of_byte_tokens_is_held_until_it_is_over() -> None:
    tokenizer = sentencepiece()
    first, *rest = tokenizer.encode("日", add_special_tokens=False)
    stream = tokenizer.stream()
    assert stream.push([first, *rest]) == ""
    assert stream.push(tokenizer.encode("a", add_special_tokens=False)) == "日 a"


def test_decoding_bit_by_bit_takes_time_in_proportion() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("The quick brown fox, 日本 again. " * 200)
    decoded = 0

    def decode(some: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(some)
        return tokenizer.decode(some, skip_special_tokens=False)

    vocabulary = tokenizer.hf.get_vocab()
    spelled = {vocabulary[f"<0x{byte:02X}>"] for byte in range(256)}
    stream = WindowDecoder(decode, lambda _: True, spelled.__contains__)
    text = "".join(stream.push([token]) for token in ids) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded < 6 * len(ids)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "smollm2"])
def test_the_bytes_of_tokens_add_up_to_the_text(name: str) -> None:
    tokenizer = ALL[name]()
    text = "Grüße 🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    bytes_of = b"".join(map(tokenizer.bytes_of, ids))
    assert bytes_of.decode().replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("name", sorted(BUILT))
def test_special_tokens_are_added_unless_the_text_has_them(name: str) -> None:
    tokenizer = BUILT[name]()
    plain = tokenizer.encode("a fox", add_special_tokens=False)
    begins = [tokenizer.hf.get_vocab()["<s>"]] if tokenizer.bos_token else []
    assert tokenizer.encode("a fox") == [*begins, *plain]
    if tokenizer.bos_token:
        written = tokenizer.encode(tokenizer.bos_token + "a fox")
        assert [written.count(token) for token in begins] == [1]
        assert tokenizer.encode(tokenizer.bos_token, add_special_tokens=True) == begins * 2


def test_many_threads_encode_alike() -> None:
    tokenizer = byte_level()
    texts = [f"The fox {number} naïve 日本語 " * 30 for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(t) for t in texts]


def test_a_folder_names_more_end_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.hf.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 9}))
    assert Tokenizer.load(tmp_path).eos_token_ids == {1, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == {1, 2, 5}
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("naïve fox") == tokenizer.encode("naïve fox")


def test_a_folder_without_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"(?s)no tokenizer could be loaded .* tokenizer_path"):
        Tokenizer.load(tmp_path)


def test_the_default_models_tokenizer_is_smollm2s() -> None:
    tokenizer = smollm2()
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.special_tokens["unk_token"] == "<|endoftext|>"
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    assert tokenizer.encode("Hello world") == [19556, 905]
    # Digits stand alone in its training text, so the spaces before them form one token.
    pieces = tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("a  2024"))
    assert pieces == ["a", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.chat_template is not None
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template


# -- kept ones --------------------------------------------------------------------------------


@cache
def kept(name: str) -> Tokenizer:
    """A tokenizer that went through the cache folder, as it comes out there."""
    stored = ALL[name]().keep()
    assert stored is not None
    return Tokenizer(KeptTokenizer(resolve_model(DEFAULT_MODEL).path, stored))


@given(NAMES, TEXTS)
def test_a_kept_tokenizer_encodes_as_before(name: str, text: str) -> None:
    before, after = ALL[name](), kept(name)
    for special in (None, False, True):
        assert after.encode(text, special) == before.encode(text, special)


@given(id_lists(), st.booleans())
def test_a_kept_tokenizer_decodes_as_before(case: tuple[str, list[int]], skip: bool) -> None:
    name, ids = case
    before, after = ALL[name](), kept(name)
    assert after.decode(ids, skip) == before.decode(ids, skip)
    assert after.stream(skip).push(ids) == before.stream(skip).push(ids)
    assert [after.bytes_of(token) for token in ids] == [before.bytes_of(token) for token in ids]
    assert not after.whole


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_kept_tokenizer_is_known_by_the_same_traits(name: str) -> None:
    before, after = ALL[name](), kept(name)
    assert after.eos_token_ids == before.eos_token_ids
    assert after.vocab_size == before.vocab_size
    assert after.special_tokens == before.special_tokens
    assert after.chat_template == before.chat_template
    assert after.backend_json == before.backend_json
    assert after.keep() == before.keep()


def test_the_whole_of_a_kept_tokenizer_is_read_once_when_asked_for() -> None:
    stored = smollm2().keep()
    assert stored is not None
    tokenizer = Tokenizer(KeptTokenizer(resolve_model(DEFAULT_MODEL).path, stored))
    whole = [tokenizer.whole]
    with ThreadPoolExecutor(8) as pool:
        found = set(map(id, pool.map(lambda _: tokenizer.hf, range(8))))
    assert found == {id(tokenizer.hf)}
    assert [*whole, tokenizer.whole] == [False, True]
    assert tokenizer.hf.get_vocab() == smollm2().hf.get_vocab()
    tokenizer.hf.chat_template = "{{ 'another' }}"
    assert tokenizer.chat_template == "{{ 'another' }}"


@pytest.mark.parametrize("stored", [b"", b"{}\n{}", b"null", b'{"eos_token_ids": 1}\n'])
def test_what_is_no_kept_tokenizer_is_refused(stored: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer|Expecting"):
        KeptTokenizer(tmp_path, stored)


def test_the_characters_of_byte_level_vocabularies_are_those_of_transformers() -> None:
    theirs: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    vocabulary = {char: index for index, char in enumerate(sorted(theirs.values()))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))  # type: ignore[no-untyped-call]
    for byte, char in theirs.items():
        assert tokenizer.bytes_of(vocabulary[char]) == bytes([byte])
