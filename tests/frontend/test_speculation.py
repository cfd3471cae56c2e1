"""``num_api_spec_tokens``: one call for a whole turn where the model cannot continue a turn."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

import asyncsgl as sgl
import asyncsgl.sync
from asyncsgl.backends.base import FEATURES, Capabilities
from asyncsgl.errors import BackendTimeout, InvalidArgument, UnsupportedFeature
from asyncsgl.program.events import Reasoning, Text, VariableFinished, VariableStarted
from asyncsgl.testing import Answers, ScriptedBackend
from asyncsgl.types import Completion, Delta, GenRequest

pytestmark = pytest.mark.anyio

CHAT = Capabilities(
    native=frozenset(FEATURES) - {"continue_assistant", "select", "top_k"},
    emulated=frozenset({"select"}),
    hints={"continue_assistant": "use num_api_spec_tokens"},
)
STEVE = "Name: Steve Jobs.\nBirthday: February 24, 1955.\nJob: Apple CEO.\nWelcome.\n"
ADA = "Name: Ada Lovelace.\nBirthday: December 10, 1815.\nJob: Mathematician.\nWelcome.\n"


class Chat(ScriptedBackend):
    """Cannot continue a turn, but can choose in one, as the backends of providers."""

    def check_select(self, request: GenRequest) -> None:
        super().check_select(replace(request, continue_assistant=False))


def chat(answers: Answers, **settings: Any) -> Chat:
    return Chat(answers, capabilities=CHAT, **settings)


def character(s: sgl.ProgramState) -> None:
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user("Construct a character within the following format:")
    s += sgl.assistant(STEVE)
    s += sgl.user("Please generate new Name, Birthday and Job.\n")
    s += sgl.assistant(
        "Name:"
        + sgl.gen("name", stop="\n")
        + "\nBirthday:"
        + sgl.gen("birthday", stop="\n")
        + "\nJob:"
        + sgl.gen("job", stop="\n")
        + "\nWelcome.\n"
    )


speculated = sgl.function(num_api_spec_tokens=256)(character)


def told(request: GenRequest) -> list[str]:
    return [message.text for message in request.messages]


def meta_of(state: sgl.State, name: str) -> sgl.Meta:
    meta = state.meta(name)
    assert isinstance(meta, sgl.Meta)
    return meta


async def test_one_call_gives_all_values_of_a_turn() -> None:
    backend = chat([ADA])
    state = await speculated.run(backend=backend)
    assert [state[name] for name in ("name", "birthday", "job")] == [
        " Ada Lovelace.",
        " December 10, 1815.",
        " Mathematician.",
    ]
    assert state.messages()[-1] == {"role": "assistant", "content": ADA}
    [request] = backend.requests
    assert told(request)[-1] == ""
    assert told(request)[:-1] == [message["content"] for message in state.messages()[:-1]]
    assert request.sampling.max_tokens == 256
    assert request.sampling.stop is None
    assert state.usage.requests == 1
    meta = meta_of(state, "birthday")
    assert meta.matched_stop == "\n"
    assert meta.emulated == (
        "num_api_spec_tokens: read from one call of 256 tokens for the whole turn",
    )


async def test_the_metas_of_a_turn_add_up_to_its_cost() -> None:
    state = await speculated.run(backend=chat([ADA]))
    metas = [meta_of(state, name) for name in ("name", "birthday", "job")]
    assert sum(meta.prompt_tokens for meta in metas) == state.usage.prompt_tokens > 0
    assert sum(meta.completion_tokens for meta in metas) == state.usage.completion_tokens > 0


async def test_without_it_the_turn_is_refused_before_anything_is_sent() -> None:
    backend = chat([ADA])
    with pytest.raises(UnsupportedFeature, match="num_api_spec_tokens"):
        await sgl.function(character).run(backend=backend)
    assert backend.requests == []


async def test_where_turns_can_be_continued_nothing_changes() -> None:
    backend = ScriptedBackend([" Ada", " today", " none"])
    state = await speculated.run(backend=backend)
    assert len(backend.requests) == 3
    assert meta_of(state, "job").emulated == ()


async def test_a_turn_that_is_one_gen_is_an_ordinary_call() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def ask(s: sgl.ProgramState) -> None:
        s += sgl.user("Hi.")
        with s.assistant():
            s += sgl.gen("answer", max_tokens=5, stop="!") + "!"

    backend = chat(["Hello! And more"])
    state = await ask.run(backend=backend)
    assert state["answer"] == "Hello"
    assert backend.requests[0].sampling.max_tokens == 5
    assert meta_of(state, "answer").emulated == ()


async def test_text_before_a_single_gen() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def count(s: sgl.ProgramState) -> None:
        s += sgl.user("Count.")
        s += sgl.assistant("One, two, " + sgl.gen("rest"))

    state = await count.run(backend=chat("One, two, three, four"))
    assert state["rest"] == "three, four"


# -- what ends a value -------------------------------------------------------------------------


async def test_without_a_stop_the_text_after_it_ends_a_value() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def pair(s: sgl.ProgramState) -> None:
        s += sgl.user("Two fruits.")
        s += sgl.assistant("First: " + sgl.gen("a") + ", " + "second: " + sgl.gen("b"))

    state = await pair.run(backend=chat("First: figs, dates, second: plums, pears"))
    assert (state["a"], state["b"]) == ("figs, dates", "plums, pears")
    assert meta_of(state, "a").matched_stop is None


async def test_a_stop_string_may_be_missing_in_the_text_after_it() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def pair(s: sgl.ProgramState) -> None:
        s += sgl.user("Two fruits.")
        s += sgl.assistant(sgl.gen("a", stop=";") + " and " + sgl.gen("b", stop=";") + sgl.gen("c"))

    state = await pair.run(backend=chat(["figs; and plums;pears"]))
    assert (state["a"], state["b"], state["c"]) == ("figs", "plums", "pears")
    assert state.messages()[-1]["content"] == "figs and plumspears"


async def test_a_stop_pattern_ends_a_value() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def pair(s: sgl.ProgramState) -> None:
        s += sgl.user("When?")
        s += sgl.assistant(sgl.gen("a", stop_regex=r"\d+") + "1969" + sgl.gen("b"))

    state = await pair.run(backend=chat(["In 1969, I think"]))
    assert (state["a"], state["b"]) == ("In ", ", I think")


async def test_the_length_of_the_turn_ends_its_last_value() -> None:
    @sgl.function(num_api_spec_tokens=4)
    async def short(s: sgl.ProgramState) -> None:
        s += sgl.user("Go on.")
        s += sgl.assistant("One " + sgl.gen("rest", stop="\n", max_tokens=100))

    state = await short.run(backend=chat("One two three four five"))
    meta = meta_of(state, "rest")
    assert (state["rest"], meta.finish_reason) == ("two three four", "length")
    assert "max_tokens: that of the whole turn" in meta.emulated


class Mood(enum.Enum):
    GOOD = "good"
    GOODISH = "goodish"


class Town(BaseModel):
    name: str
    people: int


@sgl.function(num_api_spec_tokens=64)
async def typed(s: sgl.ProgramState) -> None:
    s += sgl.user("Describe it.")
    with s.assistant():
        s += "Year: " + sgl.gen("year", regex=r"\d{4}") + ". Age:" + sgl.gen("age", dtype=int)
        s += (
            ". Mood: "
            + sgl.gen("mood", dtype=Mood)
            + ". "
            + sgl.select("sure", ["yes", "yes, very"])
        )
        s += ". Town: " + sgl.gen("town", dtype=Town)


TYPED = 'Year: 1969. Age: 42. Mood: goodish. yes, very. Town: {"name": "Lima", "people": 9} etc.'


async def test_types_patterns_schemas_and_choices_are_read_from_the_turn() -> None:
    backend = chat([TYPED])
    state = await typed.run(backend=backend)
    assert state["year"] == "1969"
    assert state.value("age") == 42
    assert state.value("mood") is Mood.GOODISH
    assert state["sure"] == "yes, very"
    assert state.value("town") == Town(name="Lima", people=9)
    assert any("regex" in words for words in meta_of(state, "year").emulated)
    assert len(backend.requests) == 1
    assert state.usage.requests == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (TYPED.replace("1969", "of the moon"), "where text that matches"),
        (TYPED.replace("42", "old"), "where int is wanted"),
        (TYPED.replace("goodish", "bad"), "where one of good, goodish is wanted"),
        (TYPED.replace("yes, very", "no"), "where one of these is wanted: yes, yes, very"),
        (TYPED.replace("9}", '"nine"}'), "does not fit the schema"),
        (TYPED.replace(". Age", ", age"), "does not begin with 'Year: 1969. Age:'"),
    ],
    ids=["regex", "int", "enum", "choice", "schema", "text"],
)
async def test_what_does_not_fit_is_asked_for_again_with_the_reason(
    bad: str, why: str, streamed: bool
) -> None:
    backend = chat([bad, TYPED])
    if streamed:
        async with typed.stream(backend=backend) as running:
            state = await running.result()
    else:
        state = await typed.run(backend=backend)
    assert state["year"] == "1969"
    assert state.value("town") == Town(name="Lima", people=9)
    first, second = backend.requests
    assert told(second)[: len(told(first)) - 1] == told(first)[:-1]
    assert told(second)[-3] == bad
    assert why in told(second)[-2]
    assert "<town: Town>" in told(second)[-2]
    assert state.usage.requests == 2


# -- misfits -------------------------------------------------------------------------------------


async def test_what_was_read_stays_when_the_rest_is_asked_for_again() -> None:
    backend = chat(["Name: Ada\nBorn: 1815\n", "Name: Ada\nBirthday: 1815\nJob: count\nWelcome.\n"])
    state = await speculated.run(backend=backend)
    assert (state["name"], state["birthday"], state["job"]) == (" Ada", " 1815", " count")
    assert "Name: Ada\nBirthday:<birthday>\nJob:<job>\nWelcome.\n" in told(backend.requests[1])[-2]


async def test_after_three_tries_each_value_is_asked_for_alone() -> None:
    backend = chat(["No.", "Never.", "Not at all.", " Ada", " 1815\nand so on", " count"])
    state = await speculated.run(backend=backend)
    assert (state["name"], state["birthday"], state["job"]) == (" Ada", " 1815", " count")
    assert state.usage.requests == len(backend.requests) == 6
    alone = backend.requests[4]
    assert alone.sampling.stop == ("\n",)
    assert "Name: Ada\nBirthday:" in told(alone)[-2]
    assert told(alone)[-1] == ""
    assert [message.role for message in alone.messages][-2:] == ["user", "assistant"]
    assert any("asked alone" in words for words in meta_of(state, "birthday").emulated)
    assert state.messages()[-1]["content"] == "Name: Ada\nBirthday: 1815\nJob: count\nWelcome.\n"


async def test_where_begun_turns_are_folded_anyway_the_backend_folds_them() -> None:
    folding = Capabilities(CHAT.native, CHAT.emulated | {"continue_assistant"})
    backend = ScriptedBackend(["No."] * 3 + [" Ada", " 1815", " count"], capabilities=folding)
    await speculated.run(backend=backend)
    assert told(backend.requests[3])[-1] == "Name:"


async def test_a_choice_that_cannot_be_read_is_chosen_alone() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def choose(s: sgl.ProgramState) -> None:
        s += sgl.user("Is it?")
        s += sgl.assistant("I say " + sgl.select("verdict", ["yes", "no"]) + "!")

    backend = chat(["Hm."] * 3, scores={"no": -0.1})
    state = await choose.run(backend=backend)
    assert state["verdict"] == "no"
    assert len(backend.requests) == 4
    assert any("asked alone" in words for words in meta_of(state, "verdict").emulated)


async def test_a_gen_that_samples_otherwise_has_its_own_call() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def pair(s: sgl.ProgramState) -> None:
        s += sgl.user("Two.")
        s += sgl.assistant(
            "A: " + sgl.gen("a", stop="\n") + "\nB: " + sgl.gen("b", temperature=0.9, stop="\n")
        )

    backend = chat(["A: one\nB: two", "three"])
    state = await pair.run(backend=backend)
    assert (state["a"], state["b"]) == ("one", "three")
    assert [request.sampling.temperature for request in backend.requests] == [None, 0.9]


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("return_logprob", True), ("stop_token_ids", [5]), ("top_k", 5), ("min_tokens", 3)],
)
async def test_what_a_whole_turn_cannot_give_is_refused_before_sending(
    field: str, value: object
) -> None:
    overrides: dict[str, Any] = {field: value}

    @sgl.function(num_api_spec_tokens=64)
    async def pair(s: sgl.ProgramState) -> None:
        s += sgl.user("Two.")
        s += sgl.assistant(sgl.gen("a", stop="\n") + "\n" + sgl.gen("b", **overrides))

    backend = chat("one\ntwo")
    with pytest.raises(UnsupportedFeature) as caught:
        await pair.run(backend=backend)
    assert caught.value.feature == field
    assert backend.requests == []


async def test_a_grammar_in_the_turn_is_refused_before_sending() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def pair(s: sgl.ProgramState) -> None:
        s += sgl.user("Two.")
        s += sgl.assistant(sgl.gen("a", stop="\n") + "\n" + sgl.gen("b", ebnf='root ::= "x"'))

    backend = chat("one\nx")
    with pytest.raises(UnsupportedFeature, match="ebnf"):
        await pair.run(backend=backend)
    assert backend.requests == []


# -- programs ------------------------------------------------------------------------------------


async def test_a_body_may_read_and_go_on_in_the_turn() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def thoughtful(s: sgl.ProgramState) -> str:
        s += sgl.user("A number and its double.")
        with s.assistant():
            s += "N=" + sgl.gen("n", stop=";")
            double = 2 * int(await s["n"])
            s += f"; 2N={double}, " + sgl.gen("word", stop=".")
        return str(await s["word"])

    backend = chat(["N=21; 2N=42, fine. And more"])
    state = await thoughtful.run(backend=backend)
    assert state.return_value == "fine"
    assert len(backend.requests) == 1


async def test_every_turn_has_calls_of_its_own() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def turns(s: sgl.ProgramState) -> None:
        for number in range(2):
            s += sgl.user(f"Question {number}?")
            s += sgl.assistant("A: " + sgl.gen(f"a{number}", stop="."))

    backend = chat(["A: one. B", "A: two. C"])
    state = await turns.run(backend=backend)
    assert (state["a0"], state["a1"]) == ("one", "two")
    assert told(backend.requests[1]) == ["Question 0?", "A: one", "Question 1?", ""]


async def test_branches_do_not_share_what_is_left_of_a_turn() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def forked(s: sgl.ProgramState) -> None:
        s += sgl.user("Go.")
        s += sgl.assistant_begin()
        s += "A: " + sgl.gen("a", stop="\n")
        async with s.fork(2) as branches:
            branches += "\nB: " + sgl.gen("b", stop="\n")
        s += "\nC: " + sgl.gen("c", stop="\n") + sgl.assistant_end()

    backend = chat(["A: 1\nC: 9", "A: 1\nB: 2", "A: 1\nB: 3"])
    state = await forked.run(backend=backend)
    assert sorted(state["b"]) == ["2", "3"]
    assert state["c"] == "9"
    assert len(backend.requests) == 3


async def test_joined_text_that_the_turn_does_not_have_is_asked_for_again() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def forked(s: sgl.ProgramState) -> None:
        s += sgl.user("Go.")
        s += sgl.assistant_begin()
        s += "A: " + sgl.gen("a", stop="\n")
        branches = s.fork(2)
        branches += [" (x)", " (y)"]
        await branches.join("concate_and_append")
        s += "\nC: " + sgl.gen("c", stop="\n") + sgl.assistant_end()

    backend = chat(["A: 1\nC: 9", "A: 1 (x) (y)\nC: 8"])
    state = await forked.run(backend=backend)
    assert state["c"] == "8"
    assert state.messages()[-1]["content"] == "A: 1 (x) (y)\nC: 8"


async def test_a_batch_keeps_its_rows_apart() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def row(s: sgl.ProgramState, number: int) -> None:
        s += sgl.user(f"Number {number}.")
        s += sgl.assistant("A=" + sgl.gen("a", stop=",") + ",B=" + sgl.gen("b", stop=","))

    async def answer(request: GenRequest) -> str:
        number = int(told(request)[0].split()[1][:-1])
        await asyncio.sleep(0)
        return f"A={number},B={2 * number},"

    backend = chat(answer)
    rows = [{"number": number} for number in range(100)]
    states = await row.run_batch(rows, backend=backend, num_threads=32)
    assert [(s["a"], s["b"]) for s in states] == [(str(n), str(2 * n)) for n in range(100)]
    assert len(backend.requests) == 100


@pytest.mark.parametrize("repeat", range(5))
def test_a_blocking_program_waits_for_its_whole_turn(repeat: int) -> None:
    @asyncsgl.sync.function(num_api_spec_tokens=64)
    def pair(s: Any) -> None:
        with s.user():
            s += "Two fruits."
        with s.assistant():
            s += "First: "
            s += sgl.gen("a")
            s += ", second: "
            s += sgl.gen("b")
        with s.user():
            s += "And?"
        with s.assistant():
            s += sgl.gen("c", max_tokens=7)

    backend = chat(["First: figs, second: plums", "Nothing."])
    state = pair.run(backend=backend)
    assert (state["a"], state["b"], state["c"]) == ("figs", "plums", "Nothing.")
    assert [request.sampling.max_tokens for request in backend.requests] == [64, 7]


def test_a_blocking_program_may_read_in_the_turn() -> None:
    @asyncsgl.sync.function(num_api_spec_tokens=64)
    def thoughtful(s: Any) -> int:
        s += sgl.user("A number.")
        with s.assistant():
            s += "N="
            s += sgl.gen("n", stop=";")
            s += f"; 2N={2 * int(s['n'])}, "
            s += sgl.gen("word", stop=".")
        return len(s["word"])

    backend = chat(["N=21; 2N=42, fine."])
    state = thoughtful.run(backend=backend)
    assert (state["n"], state["word"], state.return_value) == ("21", "fine", 4)
    assert len(backend.requests) == 1


def test_a_blocking_program_streams_its_turn() -> None:
    blocking = asyncsgl.sync.function(num_api_spec_tokens=256)(character)
    with blocking.run(backend=chat([ADA], chunk_size=5), stream=True) as state:
        names = list(state.text_iter("name"))
        jobs = list(state.text_iter("job"))
    assert ("".join(names), "".join(jobs)) == (" Ada Lovelace.", " Mathematician.")


async def test_binding_keeps_it_and_nonsense_is_refused() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def count(s: sgl.ProgramState, what: str) -> None:
        s += sgl.user(what)
        s += sgl.assistant("A " + sgl.gen("rest"))

    state = await count.bind(what="Go.").run(backend=chat("A b"))
    assert state["rest"] == "b"
    for nonsense in (0, -1, True, "64", 1.5):
        with pytest.raises(InvalidArgument, match="num_api_spec_tokens"):
            sgl.function(character, num_api_spec_tokens=nonsense)  # type: ignore[arg-type]


# -- streams -------------------------------------------------------------------------------------


async def test_values_are_streamed_while_the_turn_is_written() -> None:
    async with speculated.stream(backend=chat([ADA], chunk_size=5)) as running:
        names = [piece async for piece in running.text("name")]
        jobs = [piece async for piece in running.text("job")]
        whole = "".join([piece async for piece in running.text()])
        state = await running.result()
    assert len(names) > 1
    assert "".join(names) == state["name"] == " Ada Lovelace."
    assert "".join(jobs) == state["job"] == " Mathematician."
    assert whole.endswith(ADA)


async def test_the_events_of_a_streamed_turn() -> None:
    kinds = []
    async with speculated.stream(backend=chat([ADA], chunk_size=3)) as running:
        async for event in running:
            if isinstance(event, (VariableStarted, VariableFinished)):
                kinds += [(type(event).__name__, event.name)]
    assert kinds == [
        (kind, name)
        for name in ("name", "birthday", "job")
        for kind in ("VariableStarted", "VariableFinished")
    ]


async def test_a_value_is_complete_before_the_turn_is() -> None:
    goes_on = asyncio.Event()

    class Slow(ScriptedBackend):
        async def stream(self, request: GenRequest) -> AsyncGenerator[Delta, None]:
            async for delta in super().stream(request):
                yield delta
                if delta.text == "\nB: ":
                    await goes_on.wait()

    @sgl.function(num_api_spec_tokens=64)
    async def pair(s: sgl.ProgramState) -> None:
        s += sgl.user("Two.")
        s += sgl.assistant("A: " + sgl.gen("a", stop="\n") + "\nB: " + sgl.gen("b"))

    backend = Slow("A: x\nB: y", capabilities=CHAT, chunk_size=4)
    async with pair.stream(backend=backend) as running:
        assert [piece async for piece in running.text("a")] == ["x"]
        goes_on.set()
        assert (await running.result())["b"] == "y"


async def test_a_turn_that_rambles_on_is_given_up() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def brief(s: sgl.ProgramState) -> None:
        s += sgl.user("Go.")
        s += sgl.assistant("A: " + sgl.gen("a", stop="\n"))

    backend = chat(Completion("A: x\n" + "and so on " * 100), chunk_size=2, chunk_delay=0.001)
    async with brief.stream(backend=backend) as running:
        state = await running.result()
    assert state["a"] == "x"
    assert (backend.running, backend.cancelled) == (0, 1)
    assert state.usage.requests == 1
    assert state.usage.completion_tokens < 100


async def test_leaving_the_stream_early_ends_the_call() -> None:
    backend = chat(ADA, chunk_size=1, chunk_delay=0.001)
    async with speculated.stream(backend=backend) as running:
        async for _ in running.text("name"):
            break
    assert (backend.running, backend.cancelled) == (0, 1)


async def test_a_body_that_stays_in_its_turn_holds_nothing_up() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def open_end(s: sgl.ProgramState) -> None:
        s += sgl.user("Go.")
        s += sgl.assistant_begin()
        s += "A: " + sgl.gen("a", stop="\n")
        await s["a"]

    backend = chat(Completion("A: x\n" + "and so on " * 100), chunk_size=2, chunk_delay=0.001)
    async with open_end.stream(backend=backend) as running:
        assert (await running.result())["a"] == "x"
    assert backend.running == 0


async def test_a_failing_body_gives_up_the_call_of_its_turn() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def fails(s: sgl.ProgramState) -> None:
        s += sgl.user("Go.")
        s += sgl.assistant_begin()
        s += "A: " + sgl.gen("a", stop="\n")
        await s["a"]
        raise KeyError("mine")

    backend = chat(Completion("A: x\n" + "and so on " * 100), chunk_size=2, chunk_delay=0.001)
    with pytest.raises(KeyError, match="mine"):
        async with fails.stream(backend=backend) as running:
            await running.result()
    assert backend.running == 0


async def test_an_error_of_the_call_is_the_programs() -> None:
    backend = chat(BackendTimeout("too slow", backend="scripted"))
    with pytest.raises(BackendTimeout, match="too slow"):
        await speculated.run(backend=backend)
    with pytest.raises(BackendTimeout, match="too slow"):
        async with speculated.stream(backend=backend) as running:
            _ = [piece async for piece in running.text("name")]


async def test_reasoning_belongs_to_the_first_value() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def think(s: sgl.ProgramState) -> None:
        s += sgl.user("Think.")
        with s.assistant():
            s += "A: " + sgl.separate_reasoning(sgl.gen("a", stop="\n"), "qwen3")
            s += "\nB: " + sgl.gen("b")

    answer = Completion("A: x\nB: y", reasoning="It is so.")
    state = await think.run(backend=chat(answer))
    assert (state["a_reasoning_content"], state["a"], state["b"]) == ("It is so.", "x", "y")
    async with think.stream(backend=chat(answer)) as running:
        seen = [event async for event in running if isinstance(event, (Reasoning, Text))]
    assert [e.text for e in seen if isinstance(e, Reasoning)] == ["It is so."]
    assert [e.text for e in seen if isinstance(e, Text) and e.name == "a"] == ["x"]


async def test_thoughts_between_tags_are_split_off_within_the_turn() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def think(s: sgl.ProgramState) -> None:
        s += sgl.user("Think.")
        with s.assistant():
            s += sgl.separate_reasoning(sgl.gen("a", stop="\n"), "qwen3")
            s += "\nB: " + sgl.gen("b")

    backend = chat(["<think>It is so.</think>x\nB: y"])
    state = await think.run(backend=backend)
    assert (state["a_reasoning_content"], state["a"], state["b"]) == ("It is so.", "x", "y")
    assert len(backend.requests) == 1


async def test_a_scope_around_a_turn_has_its_text() -> None:
    @sgl.function(num_api_spec_tokens=64)
    async def scoped(s: sgl.ProgramState) -> None:
        s += sgl.user("Go.")
        with s.assistant(), s.var_scope("all"):
            s += "A: " + sgl.gen("a", stop="\n")
            s += "\nB: " + sgl.gen("b", stop="\n")

    state = await scoped.run(backend=chat(["A: x\nB: y\n"]))
    assert state["all"] == "A: x\nB: y"
