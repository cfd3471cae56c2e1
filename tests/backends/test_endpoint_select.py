"""``select`` on an SGLang server: token ids decide where a choice begins."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

import asyncsgl as sgl
from asyncsgl import RuntimeEndpoint
from asyncsgl.program.prefix import prefix_request
from asyncsgl.testing_server import Abort, FakeServer, Refuse
from asyncsgl.testing_server.model import FakeModel
from asyncsgl.types import ChoiceScore

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("http_library")]


def merging(text: str) -> list[str]:
    """A tokenizer that joins letters of a word only across what is a word: "ab" is one token."""
    return re.findall(r" ?[a-z]+|[A-Z]| |\W", text)


def by_length(before: Sequence[str], token: str) -> float:
    """A logprob that tells where a token stands and how long it is."""
    return -(len(before) + len(token) / 100)


async def scored(
    prompt: str,
    choices: Sequence[str],
    *,
    begin: str = "",
    pads: bool = False,
    known_begin: str = "",
    unconditional: bool = False,
) -> tuple[tuple[ChoiceScore, ...], FakeServer]:
    model = FakeModel("", tokenize=merging, logprob=by_length, begin=begin, pads=pads)
    info: dict[str, object] = {"model_path": "x"}
    if known_begin:
        info["special_tokens"] = {"bos_token": known_begin}
    async with (
        FakeServer(model=model, model_info=info) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        request = prefix_request(prompt)
        scores = await there.score(request, choices, unconditional=unconditional)
    assert scores.usage.requests == 1
    assert scores.usage.prompt_tokens > 0
    return scores.choices, server


@pytest.mark.parametrize("pads", [False, True])
async def test_all_choices_are_scored_in_one_call(pads: bool) -> None:
    choices, server = await scored("a b c d e f g", [" yes", " no way"], pads=pads)
    assert [choice.logprobs for choice in choices] == [(-7.04,), (-7.03, -8.04)]
    assert [choice.text for choice in choices] == [" yes", " no way"]
    computed, batch = server.generates()
    assert computed["sampling_params"]["max_new_tokens"] == 0
    assert computed["text"] == "a b c d e f g"
    assert batch["text"] == ["a b c d e f g", "a b c d e f g yes", "a b c d e f g no way"]
    assert batch["logprob_start_len"] == 3
    assert batch["return_logprob"] is True
    assert len({rid[:32] for rid in batch["rid"]}) == 1
    assert {len(rid) for rid in batch["rid"]} == {40}


async def test_a_choice_that_joins_the_prompts_last_token() -> None:
    choices, _ = await scored("a b c d e f yes", ["terday", " or no"])
    assert choices[0].logprobs == (-6.1,)  # " yesterday" in place of " yes"
    assert choices[1].logprobs == (-7.03, -8.03)


async def test_a_space_at_the_prompts_end_is_no_token_of_the_choice() -> None:
    choices, _ = await scored("A B ", ["yes", "NO"])
    assert choices[0].logprobs == (-3.04,)  # " yes" took the space
    assert choices[1].logprobs == (-4.01, -5.01)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("prompt", ["A", "AB", "ABC", "ABCD", "ABCDE", "ABCDEF"])
async def test_short_prompts(prompt: str, pads: bool) -> None:
    choices, _ = await scored(prompt, ["X", "YZ"], pads=pads)
    at = len(prompt)
    assert [choice.logprobs for choice in choices] == [
        (-(at + 0.01),),
        (-(at + 0.01), -(at + 1.01)),
    ]


async def test_a_merge_far_back_is_scored_from_the_start() -> None:
    def letters(text: str) -> list[str]:
        return [text] if text.endswith("!") else list(text)

    model = FakeModel("", tokenize=letters, logprob=by_length)
    async with FakeServer(model=model) as server, RuntimeEndpoint(server.url) as there:
        scores = await there.score(prefix_request("abcdefghij"), ["k", "kl"])
        with pytest.raises(sgl.BadRequestError, match="put text before the select"):
            await there.score(prefix_request("abcdefghij"), ["k", "!"])
    assert [choice.logprobs for choice in scores.choices] == [(-10.01,), (-10.01, -11.01)]


async def test_a_choice_that_is_one_with_a_prompt_of_one_token() -> None:
    choices, _ = await scored("a", ["b", " b"], known_begin="<")
    assert choices[0].logprobs == (-1.02,)  # "ab" after "<"
    assert choices[1].logprobs == (-1.02,)  # " b" after "a"


@pytest.mark.parametrize("known", ["", "<"])
@pytest.mark.parametrize("begin", ["", "<s>"])
async def test_no_prompt_at_all(known: str, begin: str) -> None:
    if not known and not begin:
        with pytest.raises(sgl.BadRequestError, match="put text before the select"):
            await scored("", ["yes", "no"])
        return
    choices, _ = await scored("", ["yes", "no"], begin=begin, known_begin=known)
    at = bool(known) + bool(begin)
    assert [choice.logprobs for choice in choices] == [(-(at + 0.03),), (-(at + 0.02),)]


async def test_unconditional_logprobs_are_of_the_same_tokens() -> None:
    choices, server = await scored("a b c d", [" yes", " no way"], unconditional=True)
    assert [choice.unconditional for choice in choices] == [(0.0,), (0.0, -1.04)]
    assert server.generates()[-1]["input_ids"] == [list(choice.token_ids) for choice in choices]
    choices, _ = await scored("a b c d", [" yes", " no way"], unconditional=True, known_begin="<")
    assert [choice.unconditional for choice in choices] == [(-1.04,), (-1.03, -2.04)]


async def test_a_certain_token_counts() -> None:
    """A logprob of exactly 0 is the best there is, not one that is missing."""

    def certain(before: Sequence[str], token: str) -> float:
        return 0.0 if token in (" yes", " indeed") else -0.1

    @sgl.function
    async def judge(s: sgl.ProgramState) -> None:
        s += "So it is:"
        s += sgl.select("sure", [" no", " yes indeed", " yes well"])

    async with (
        FakeServer(model=FakeModel("", logprob=certain)) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        state = await judge.run(backend=there)
    assert state["sure"] == " yes indeed"
    meta = state.meta("sure")
    assert isinstance(meta, sgl.Meta)
    assert meta.choice_logprobs == ((-0.1,), (0.0, 0.0), (0.0, -0.1))
    assert meta.choice_scores == (-0.1, 0.0, -0.05)


@pytest.mark.parametrize(
    "method",
    [
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    ],
)
async def test_every_rule_works(method: sgl.ChoicesMethod) -> None:
    def liking(before: Sequence[str], token: str) -> float:
        return -0.01 if token == " b" and before else -3.0

    @sgl.function
    async def choose(s: sgl.ProgramState) -> None:
        s += "Letter:"
        s += sgl.select("letter", [" a", " b", " c"], choices_method=method)

    async with (
        FakeServer(model=FakeModel("", logprob=liking)) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        state = await choose.run(backend=there)
    assert state["letter"] == " b"


async def test_two_hundred_choices() -> None:
    choices, server = await scored("Pick:", [f" {'x' * n}" for n in range(1, 201)])
    assert len(choices) == 200
    assert len(server.generates()) == 2


async def test_errors_of_scoring() -> None:
    full = Refuse(503, {"error": {"message": "full"}})
    async with (
        FakeServer("", faults=[full, None, Abort(400, "no")]) as server,
        RuntimeEndpoint(server.url) as there,
    ):
        with pytest.raises(sgl.BadRequestError, match="no"):
            await there.score(prefix_request("a b"), [" c", " d"])
        assert there.statistics()["retries"] == 1
