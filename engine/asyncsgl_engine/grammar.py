"""Which tokens may come next: regular expressions, JSON schemas and grammars as bit masks.

The masks are llguidance's. A bit mask has one row for each sequence and one bit for each token,
bit `i % 32` of word `i // 32`, set for tokens that are allowed.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from .errors import ConfigError, InternalError, InvalidRequest
from .regex_syntax import UnsupportedRegex, translate_regex
from .schema_faults import locate_fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .request import Grammar

__all__ = ["CompiledGrammar", "GrammarCompiler", "GrammarState", "GrammarVocabulary"]

_log = logging.getLogger(__name__)
_WORD_BITS = 32
# One way to space JSON, the one models know best: free white space invites endless white space.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarVocabulary(Protocol):
    """What masks need of a tokenizer; `Tokenizer` has it."""

    @property
    def backend_json(self) -> str | None:
        """How texts are split, in the format of `tokenizer.json`; None where there is no such."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        ...


_MOST_GBNF_CHARS = 32 << 10
"""Longest grammar in GBNF, which is translated in Python, in time that grows with the square."""
_MOST_LOCATED_CHARS = 16 << 10
"""Longest schema whose fault is looked for part by part."""
_MOST_CACHED_CHARS = 1 << 20
"""Of the sources of all grammars that are kept. Compiled, schemas and rules were seen to take up
to 140 bytes a character, so the bound is one of about 150 MB."""


_IN_UTF8 = (*range(0xC0), *range(0xC2, 0xF5))
"""The bytes that may stand in UTF-8; some vocabularies lack rare ones."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the ones used last. Safe in several threads.

    Args:
        tokenizer: whose tokens the masks speak of.
        vocab_size: width of the model's logits, when it is more than the tokenizer's size.
        cache_size: compiled grammars kept, unless their sources are too large together.
        num_threads: threads that fill masks; None for most of the processors.

    Raises:
        ConfigError: the tokenizer has no end token or no fast implementation, or has more tokens
            than the model.
    """

    MOST = 256 * 1024
    """Characters of the longest grammar that is taken: a second's work for the compiler."""

    def __init__(
        self,
        tokenizer: GrammarVocabulary,
        vocab_size: int | None = None,
        *,
        cache_size: int = 256,
        num_threads: int | None = None,
    ) -> None:
        self._vocab_size = vocab_size or tokenizer.vocab_size
        self._tokenizer = _ll_tokenizer(tokenizer, self._vocab_size)
        self._spells_all = all(self._tokenizer.tokenize_bytes(bytes([byte])) for byte in _IN_UTF8)
        self._executor = LLExecutor(num_threads)
        self._limits = LLParserLimits(verbose_errors=False)
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._cache_size = cache_size
        self._cached_chars = 0
        self._lock = Lock()

    @property
    def mask_words(self) -> int:
        """Words of 32 bits in a row of a bit mask."""
        return -(-self._vocab_size // _WORD_BITS)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile a grammar, or find it compiled.

        Recurses along chains of rules: use a thread with a deep stack for grammars that are
        not your own.

        Args:
            grammar: a regular expression in Python's syntax, the whole output of which is to
                match; a JSON schema, for JSON in the style of `json.dumps`; or Lark or GBNF.

        Returns:
            The compiled grammar, to be shared by any number of sequences.

        Raises:
            InvalidRequest: it is malformed or uses what is not supported; the message says what
                and where.
        """
        if found := self.find(grammar):
            return found
        compiled = CompiledGrammar(self._matcher(grammar), self._spells_all)
        with self._lock:
            replaced = self._cache.pop(grammar, None)
            self._cache[grammar] = compiled
            self._cached_chars += 0 if replaced else len(grammar.source)
            while len(self._cache) > self._cache_size or self._cached_chars > _MOST_CACHED_CHARS:
                dropped, _ = self._cache.popitem(last=False)
                self._cached_chars -= len(dropped.source)
        return compiled

    def find(self, grammar: Grammar) -> CompiledGrammar | None:
        """A grammar that is compiled and kept; None if it is not."""
        with self._lock:
            found = self._cache.get(grammar)
            if found is not None:
                self._cache.move_to_end(grammar)
            return found

    def allocate(self, rows: int) -> NDArray[np.int32]:
        """A bit mask that allows everything.

        Args:
            rows: how many sequences it is for.

        Returns:
            Words, shape [rows, mask_words].
        """
        return np.full((rows, self.mask_words), -1, dtype=np.int32)

    def fill_masks(
        self,
        states: Sequence[GrammarState],
        bitmask: NDArray[np.int32],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Fill rows of a bit mask at once, on several threads and without the interpreter's lock.

        Args:
            states: different states, one for each row to fill.
            bitmask: words, shape [at least len(states), mask_words], contiguous.
            rows: the row of each state; None for 0, 1, 2 and so on.

        Raises:
            InvalidRequest: a grammar became too complex to go on.
        """
        assert bitmask.dtype == np.int32
        assert bitmask.shape[1] == self.mask_words
        assert bitmask.flags.c_contiguous
        targets = range(len(states)) if rows is None else rows
        pairs = [(state.matcher, row) for state, row in zip(states, targets, strict=True)]
        self._executor.unsafe_compute_mask_ptr(
            pairs, bitmask.ctypes.data, self.mask_words * 4, len(bitmask)
        )
        for state in states:
            state.check()

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        _check_size(grammar)
        source = _definition(grammar)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InvalidRequest("grammar", self._fault(grammar, _tidy(matcher.get_error())))
        for warning in matcher.get_grammar_warnings():
            _log.warning("grammar: %s: %s", grammar.kind, warning)
        return matcher

    def _fault(self, grammar: Grammar, problem: str) -> str:
        """What is wrong with a grammar, and where."""
        if grammar.kind == "regex":
            return f"regex {grammar.source!r}: {problem}"
        if grammar.kind == "ebnf" or len(grammar.source) > _MOST_LOCATED_CHARS:
            return f"{grammar.kind}: {problem}"

        def judge(schema: Any) -> str:
            return _tidied(
                LLMatcher.validate_grammar(_json_definition(schema), limits=self._limits)
            )

        where, found = locate_fault(json.loads(grammar.source), judge)
        return f"json_schema: at {where}: {found or problem}"


class CompiledGrammar:
    """A grammar that sequences can follow.

    Args:
        matcher: at the start of the grammar; it is only copied.
        spells_all: whether there is a token for every byte of UTF-8.
    """

    __slots__ = ("_matcher", "_spells_all")

    def __init__(self, matcher: LLMatcher, spells_all: bool = True) -> None:
        self._matcher = matcher
        self._spells_all = spells_all

    def new_state(self) -> GrammarState:
        """A sequence's place in the grammar, at its start."""
        return GrammarState(self._matcher.deep_copy(), self._spells_all)


class GrammarState:
    """How far one sequence has come in its grammar. Not to be used by two threads at once.

    Args:
        matcher: llguidance's state, owned by this one.
        spells_all: whether there is a token for every byte of UTF-8.
    """

    __slots__ = ("_spells_all", "matcher")

    def __init__(self, matcher: LLMatcher, spells_all: bool = True) -> None:
        self.matcher = matcher
        self._spells_all = spells_all

    @property
    def can_end(self) -> bool:
        """Whether the text so far is complete, so that an end token is allowed."""
        return self.matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token can follow, or one has."""
        return self.matcher.is_stopped()

    def accept(self, token_id: int) -> None:
        """Go on by one token; end tokens are accepted where the text may end.

        Raises:
            InternalError: the mask did not allow this token.
            InvalidRequest: the grammar became too complex to go on.
        """
        if not self.matcher.consume_token(token_id):
            self.check(f"token {token_id} was drawn though the mask forbids it: ")

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, each the only one that its mask allows.

        Empty where there is a choice, also one of how to cut the same text into tokens.
        """
        return self.matcher.compute_ff_tokens()

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the allowed tokens.

        Args:
            row: words of one row, shape [mask_words], contiguous.

        Raises:
            InvalidRequest: the grammar became too complex to go on.
        """
        assert row.dtype == np.int32
        assert row.flags.c_contiguous
        self.matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self.check()

    def check(self, blame: str = "") -> None:
        """Raise what went wrong in the matcher, if anything did.

        Args:
            blame: what the caller knows of it, when it is not the grammar's fault.

        Raises:
            InternalError: there is blame.
            InvalidRequest: the grammar ran into a limit, or asks for a character that no tokens
                spell.
        """
        if not self.matcher.is_error():
            return
        problem = _tidy(self.matcher.get_error())
        if "forced bytes" in problem and not self._spells_all:
            unspelled = "asks for a character that this model has no tokens for"
            raise InvalidRequest("grammar", f"{unspelled} ({problem})")
        if blame and "doesn't satisfy" in problem:
            raise InternalError(blame + problem)
        raise InvalidRequest("grammar", f"cannot go on: {problem}")


def _ll_tokenizer(tokenizer: GrammarVocabulary, vocab_size: int) -> LLTokenizer:
    backend = tokenizer.backend_json
    ends = sorted(token for token in tokenizer.eos_token_ids if token < vocab_size)
    if backend is None:
        raise ConfigError("grammars need a tokenizer that has a tokenizer.json")
    if not ends:
        raise ConfigError("grammars need an end-of-sequence token, and this tokenizer has none")
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}"
        )
    return LLTokenizer(backend, n_vocab=vocab_size, eos_token=ends)


def _definition(grammar: Grammar) -> str:
    """The grammar as llguidance takes it."""
    try:
        match grammar.kind:
            case "regex":
                return LLMatcher.grammar_from_regex(translate_regex(grammar.source))
            case "json_schema":
                return _json_definition(_parsed_schema(grammar.source))
            case "ebnf":
                return grammar_from("ebnf", grammar.source)
    except UnsupportedRegex as error:
        raise InvalidRequest("grammar", f"regex {grammar.source!r}: {error}") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest("grammar", f"json_schema: not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("grammar", f"{grammar.kind}: nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest("grammar", f"{grammar.kind}: {error}") from error


def _check_size(grammar: Grammar) -> None:
    size, most = len(grammar.source), GrammarCompiler.MOST
    if grammar.kind == "ebnf" and "::=" in grammar.source:
        most = _MOST_GBNF_CHARS
    if size > most:
        raise InvalidRequest(
            "grammar",
            f"{grammar.kind}: {size:,} characters, and at most {most:,} are taken; "
            "make it simpler, or loosen it and check the answer",
        )


def _parsed_schema(source: str) -> Any:
    schema = json.loads(source)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object, true or false")
    return schema


def _json_definition(schema: Any) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON_STYLE)  # type: ignore[arg-type]


def _tidied(message: str) -> str:
    return _tidy(message) if message else ""


def _tidy(message: str) -> str:
    """The message without the marks of what was left out of it."""
    if "lookarounds not supported" in message:
        return "an anchor (^ or $) stands inside the pattern, where it could match nothing"
    return message.partition("\n<")[0].strip() or "unknown"
