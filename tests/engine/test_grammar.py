"""Masks let through what the grammar says, all of it and nothing else."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest

from asyncsgl_engine.errors import ConfigError, InternalError, InvalidRequest
from asyncsgl_engine.grammar import GrammarCompiler
from asyncsgl_engine.request import Grammar
from asyncsgl_engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import byte_level, sentencepiece, smollm2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncsgl_engine.grammar import GrammarState

# The first test that needs the default model may have to fetch it.
pytestmark = [
    pytest.mark.timeout(300),
    # Python's own notice for patterns that may mean something else one day.
    pytest.mark.filterwarnings("ignore:Possible (nested set|set .*) at position:FutureWarning"),
]

TOKENIZERS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "smollm2": smollm2}

# Patterns with texts that match them in full.
REGEXES = {
    r"(yes|no)": ["yes", "no"],
    r"": [""],
    r"a": ["a"],
    r"a+": ["a", "aaaa"],
    r"a*b?": ["", "aab", "b"],
    r"a{3}": ["aaa"],
    r"a{2,4}": ["aa", "aaaa"],
    r"x{,3}": ["", "xx"],
    r"(ab){1,3}c": ["abc", "ababc"],
    r"\d{3}-\d{4}": ["555-0123"],
    r"[0-9]+(\.[0-9]+)?": ["3", "3.14"],
    r"[-+]?\d+": ["-7", "+12", "3"],
    r"[+--]{2}": ["+,", "--"],
    r"[a-f]+|[0-9]+": ["abc", "123"],
    r"[^\n]{1,20}": ["hello world"],
    r"[^a-z]+": ["ABC 123"],
    r"[^\W\d]{2,5}": ["ab_é"],
    r"\w+@\w+\.(com|org)": ["me@site.org"],
    r"\W\S\s": ["-x "],
    r"\D{1,4}": ["ab c"],
    r"[\W\d]+": ["- 12"],
    r"[^\D]+": ["12"],
    r"[^\s\w]+": ["-+!"],
    r".{3}": ["a b"],
    r"(?s).{2}": ["\n\n"],
    r"(?i)yes": ["YES", "yEs"],
    r"(?i:y)es": ["Yes"],
    r"(?i)[b-d]+": ["BcD"],
    r"(?a:\w)\w": ["aé"],
    r"(?x) a b # comment": ["ab"],
    r"(?P<year>\d{4})-(?P<month>0[1-9]|1[0-2])": ["2024-06"],
    r"(?:foo|bar)baz": ["foobaz"],
    r"(?#note)a": ["a"],
    r"^start.*end$": ["start and end"],
    r"\Aab\Z": ["ab"],
    r"a|^b": ["a", "b"],
    r'{"a": \d+}': ['{"a": 12}'],
    r'\{"name": "[a-z]{1,8}"\}': ['{"name": "bob"}'],
    r"a{": ["a{"],
    r"[[]\]": ["[]"],
    r"[]a]+": ["]a"],
    r"[a&&b]+": ["&ab"],
    r"\[\]\(\)\.\*\+\?\^\$\|\\": [r"[]().*+?^$|\ ".strip()],
    r"/path/\w+": ["/path/x"],
    r'"[^"\\]*"': ['"quoted"'],
    r"\x41\u00e9\t": ["Aé\t"],
    r"<\w+>": ["<tag>"],
    r"日本(語|人)": ["日本語", "日本人"],
    r"[ぁ-ん]{1,3}": ["のです"],
    r"🙂+": ["🙂🙂"],
    r"naïve café": ["naïve café"],
    r"(a|b|)c": ["ac", "c"],
    r"(a*)*b": ["aab", "b"],
    r"a*?b+?": ["aabb"],
    r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)": ["192.168.0.1"],
    r"(Paris|London|Rome)( is the capital)?": ["Rome", "Paris is the capital"],
    r"[A-Z][a-z]+( [A-Z][a-z]+)*": ["Ada Lovelace"],
    r"-\ \#\~\<\>": ["- #~<>"],
}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer", "minimum": -5, "maximum": 1000},
    "number": {"type": "number", "minimum": 0, "maximum": 9.5},
    "enum": {"enum": ["red", "green", 3, None]},
    "const": {"const": {"a": [1, 2]}},
    "text": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}[0-9]$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "array": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0},
              "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["x", "y"]}],
              "items": False, "minItems": 2},
    "any_of": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"const": "none"}]},
    "one_of": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "id": {"enum": [1, 2]}},
             "required": ["kind", "id"], "additionalProperties": False}
            for kind in ("cat", "dog")
        ]
    },
    "nullable": {"type": ["boolean", "null"]},
    "defs": {
        "$defs": {"point": {"type": "object", "properties": {"x": {"enum": [0, 1]}},
                            "required": ["x"], "additionalProperties": False}},
        "type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2,
    },
    "recursive": {
        "type": "object",
        "properties": {"value": {"enum": [1, 2]},
                       "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["value", "next"], "additionalProperties": False,
    },
    "all_of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 42}]},
}  # fmt: skip


@cache
def compiler(name: str) -> GrammarCompiler:
    return GrammarCompiler(TOKENIZERS[name](), num_threads=2)


def state_of(name: str, kind: Any, source: str) -> GrammarState:
    return compiler(name).compile(Grammar(kind, source)).new_state()


def allowed(row: NDArray[np.int32]) -> list[int]:
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def mask_of(name: str, state: GrammarState) -> list[int]:
    row = compiler(name).allocate(1)[0]
    state.fill_mask(row)
    return allowed(row)


def wander(name: str, state: GrammarState, seed: int, most: int = 60) -> str | None:
    """Draw allowed tokens until the text ends; None if it did not within ``most`` tokens.

    A path that has become long takes the end whenever it can, and short tokens at that.
    """
    tokenizer, draw, ids = TOKENIZERS[name](), random.Random(seed), list[int]()
    while len(ids) < most:
        choices = mask_of(name, state)
        assert choices, "a mask must leave something"
        ends = [token for token in choices if token in tokenizer.eos_token_ids]
        assert bool(ends) == state.can_end
        if ends and (len(choices) == len(ends) or len(ids) > 15 or draw.random() < 0.3):
            state.accept(ends[0])
            assert state.is_finished
            return tokenizer.decode(ids, skip_special_tokens=False)
        token = draw.choice([token for token in choices if token not in ends])
        state.accept(token)
        ids.append(token)
    return None


def follow(name: str, state: GrammarState, text: str) -> bool:
    """Whether the masks let a text through, cut as the tokenizer cuts it, and let it end."""
    tokenizer = TOKENIZERS[name]()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token not in mask_of(name, state):
            return False
        state.accept(token)
    return state.can_end


@pytest.mark.parametrize("pattern", REGEXES)
@pytest.mark.parametrize("name", ["byte_level", "smollm2"])
def test_paths_through_a_regex_match_it(name: str, pattern: str) -> None:
    ended = [
        text for seed in range(6) if (text := wander(name, state_of(name, "regex", pattern), seed))
    ]
    for text in ended:
        assert re.fullmatch(pattern, text), text
    assert ended or pattern in ("", "(a*)*b") or "*" in pattern or "+" in pattern


@pytest.mark.parametrize("pattern", REGEXES)
def test_texts_that_match_a_regex_pass(pattern: str) -> None:
    for text in REGEXES[pattern]:
        assert re.fullmatch(pattern, text), "the test's own example"
        assert follow("smollm2", state_of("smollm2", "regex", pattern), text), text
        # One character more, and the masks must agree with Python about it.
        longer = text + "!"
        passes = follow("smollm2", state_of("smollm2", "regex", pattern), longer)
        assert passes == bool(re.fullmatch(pattern, longer)), longer


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", ["byte_level", "smollm2"])
def test_paths_through_a_schema_are_valid_json(name: str, schema: str) -> None:
    source = json.dumps(SCHEMAS[schema])
    paths = [wander(name, state_of(name, "json_schema", source), seed, 150) for seed in range(4)]
    texts = [text for text in paths if text is not None]
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[schema])


def test_json_is_spaced_as_python_spaces_it() -> None:
    value = {"name": "Bob", "age": 3, "tags": ["a", "b"]}
    source = json.dumps(PERSON)
    assert follow("smollm2", state_of("smollm2", "json_schema", source), json.dumps(value))
    compact = json.dumps(value, separators=(",", ":"))
    assert not follow("smollm2", state_of("smollm2", "json_schema", source), compact)


@pytest.mark.parametrize(
    "source",
    [
        'root ::= "yes" | "no" digits?\ndigits ::= [0-9]+',
        'start: "yes" | "no" DIGITS?\nDIGITS: /[0-9]+/',
    ],
)
def test_grammars_are_written_in_lark_or_gbnf(source: str) -> None:
    for text, expected in {"yes": True, "no": True, "no42": True, "yes4": False, "": False}.items():
        assert follow("smollm2", state_of("smollm2", "ebnf", source), text) == expected
    nested = 'root ::= "(" root ")" | "x"'
    assert follow("smollm2", state_of("smollm2", "ebnf", nested), "(((x)))")
    assert not follow("smollm2", state_of("smollm2", "ebnf", nested), "((x)")


def test_a_sentencepiece_vocabulary_spells_unknown_characters_in_bytes() -> None:
    state = state_of("sentencepiece", "regex", "(日本|a fox)")
    choices = mask_of("sentencepiece", state)
    texts = sentencepiece().hf.convert_ids_to_tokens(choices)
    assert "<0xE6>" in texts
    assert "a" in texts


def test_end_tokens_are_allowed_where_the_text_may_end() -> None:
    state = state_of("smollm2", "regex", "a+")
    assert 2 not in mask_of("smollm2", state)
    state.accept(smollm2().encode("a")[0])
    assert state.can_end
    assert not state.is_finished
    assert 2 in mask_of("smollm2", state)
    state.accept(2)
    assert state.is_finished


def test_a_complete_text_leaves_only_end_tokens() -> None:
    state = state_of("smollm2", "regex", "(yes|no)")
    for token in smollm2().encode("yes"):
        state.accept(token)
    assert state.is_finished
    assert state.can_end
    assert mask_of("smollm2", state) == [2]
    assert state.forced_tokens() == []


def test_several_end_tokens_all_end() -> None:
    tokenizer = Tokenizer(smollm2().hf, [0])
    several = GrammarCompiler(tokenizer)
    state = several.compile(Grammar("regex", "a")).new_state()
    state.accept(tokenizer.encode("a")[0])
    row = several.allocate(1)[0]
    state.fill_mask(row)
    assert allowed(row) == [0, 2]


@pytest.mark.parametrize("name", ["byte_level", "smollm2"])
def test_forced_tokens_are_the_only_ones_their_masks_allow(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    state = state_of(name, "json_schema", json.dumps(PERSON))
    forced = state.forced_tokens()
    assert tokenizer.decode(forced).startswith('{"n')
    for token in forced:
        assert mask_of(name, state) == [token]
        state.accept(token)
    assert state_of(name, "regex", "(a|b)c").forced_tokens() == []


# Places where a forced piece may or may not be one token with what follows it.
SEAMS = {
    r'The (capital|river) is "[A-Z][a-z]{2,8}", they say': [
        'The capital is "Paris", they say',
        'The river is "Seine", they say',
    ],
    r'say: "(yes|no)"': ['say: "yes"', 'say: "no"'],
    r"x = \d+;  y = \d+;": ["x = 12;  y = 345;"],
    r"name:  ?[a-z ]+\.": ["name: a b.", "name:  of the."],
    r"\n\n- [a-z]+\n\n- [a-z]+": ["\n\n- one\n\n- two"],
    r"https://www\.[a-z]+\.com/(index|main)\.html": ["https://www.the.com/main.html"],
}
PEOPLE: list[dict[str, Any]] = [
    {"name": "Bob", "age": 3, "tags": ["a", "b"]},
    {"name": "Éa", "age": 130},
    {"name": "", "age": 0, "tags": []},
    {"name": " the ", "age": 12, "tags": ["", "n"]},
]


def test_forced_tokens_are_those_that_the_tokenizer_makes_of_the_text() -> None:
    cases = [("regex", pattern, text) for pattern, texts in SEAMS.items() for text in texts]
    cases += [("regex", pattern, text) for pattern, texts in REGEXES.items() for text in texts]
    people = [json.dumps(person, ensure_ascii=False) for person in PEOPLE]
    cases += [("json_schema", json.dumps(PERSON), text) for text in people]
    forced = 0
    for kind, source, text in cases:
        tokens = smollm2().encode(text, add_special_tokens=False)
        state = state_of("smollm2", kind, source)
        for index, token in enumerate(tokens):
            run = state.forced_tokens()
            assert run == tokens[index : index + len(run)], (source, text)
            forced += len(run)
            state.accept(token)
    assert forced > 200


def test_a_state_does_not_disturb_another() -> None:
    compiled = compiler("smollm2").compile(Grammar("regex", "ab"))
    one, other = compiled.new_state(), compiled.new_state()
    one.accept(smollm2().encode("ab")[0])
    assert one.is_finished
    assert not other.can_end


def test_masks_filled_at_once_are_the_masks_filled_singly() -> None:
    sources = [pattern for pattern in REGEXES if pattern]
    states = [state_of("smollm2", "regex", source) for source in sources]
    whole = compiler("smollm2").allocate(len(states) + 3)
    rows = [row + 3 for row in range(len(states))]
    compiler("smollm2").fill_masks(states, whole, rows)
    assert (whole[:3] == -1).all()
    for row, state in zip(rows, states, strict=True):
        assert allowed(whole[row]) == mask_of("smollm2", state)


def test_rows_may_be_wider_than_the_vocabulary() -> None:
    wide = GrammarCompiler(smollm2(), 49152 + 500)
    state = wide.compile(Grammar("regex", "[^x]*")).new_state()
    rows = wide.allocate(1)
    assert rows.shape == (1, wide.mask_words) == (1, 1552)
    wide.fill_masks([state], rows)
    assert max(allowed(rows[0])) < 49152


def test_the_same_grammar_is_compiled_once() -> None:
    own = GrammarCompiler(byte_level(), cache_size=2)
    first = own.compile(Grammar("regex", "a"))
    assert own.compile(Grammar("regex", "a")) is first
    own.compile(Grammar("regex", "b"))
    assert own.compile(Grammar("regex", "a")) is first
    own.compile(Grammar("regex", "c"))
    assert own.compile(Grammar("regex", "a")) is first
    assert own.compile(Grammar("ebnf", 'start: "a"')) is not first
    own.compile(Grammar("regex", "d"))
    assert own.compile(Grammar("regex", "a")) is not first


@pytest.mark.parametrize(
    ("kind", "source", "problem"),
    [
        ("regex", "a[", "unterminated character set at position 1"),
        ("regex", "a{2,1}", "min repeat greater than max repeat at position 2"),
        ("regex", "ab(?=c)", "look-ahead .* at position 2"),
        ("regex", "(?<!a)b", "look-behind .* at position 0"),
        ("regex", r"(a)\1", "back references .* at position 3"),
        ("regex", r"x\bfoo", "word boundaries .* at position 1"),
        ("regex", "(?>a)b", "atomic groups .* at position 0"),
        ("regex", "a++b", "possessive repeats .* at position 1"),
        ("regex", "a^b", "an anchor .* inside the pattern"),
        ("regex", "(?m)^a$", "anchors of lines"),
        ("json_schema", "{", "not JSON: .* line 1 column 2"),
        ("json_schema", "[1]", "an object, true or false"),
        ("json_schema", '{"type": "text"}', "Invalid type: text"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"$ref": "#/$defs/gone"}', r"'/\$defs/gone' does not exist"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ("ebnf", 'start: "a" b', r'1\(8\): unknown name: "b"'),
        ("ebnf", "start: ((", r"1\(10\): Expected token"),
        ("ebnf", 'root ::= "a" b', "Rule 'b' not found"),
        ("ebnf", 'root ::= ("a"', r"Expected '\)' at line 1"),
    ],
)
def test_a_bad_grammar_is_refused_with_its_fault(kind: Any, source: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"(?s)grammar: {kind}.*{problem}"):
        compiler("smollm2").compile(Grammar(kind, source))


def test_a_token_against_the_mask_is_an_internal_error() -> None:
    state = state_of("smollm2", "regex", "ab")
    with pytest.raises(InternalError, match="token 5 was drawn though the mask forbids it"):
        state.accept(5)


def test_a_tokenizer_must_have_an_end_token_and_fit_the_model() -> None:
    class Endless:
        backend_json = byte_level().backend_json
        vocab_size = byte_level().vocab_size
        eos_token_ids = frozenset[int]()

    with pytest.raises(ConfigError, match="end-of-sequence"):
        GrammarCompiler(Endless())
    with pytest.raises(ConfigError, match="the model only 100"):
        GrammarCompiler(byte_level(), 100)
