"""`/generate`: the answers, the forms of a request, and the quirks that clients rely on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from .conftest import CONTEXT, Serve, Served

GREEDY = {"max_new_tokens": 8, "temperature": 0}


def events(url: str, **body: Any) -> Iterator[Any]:
    """The events of a stream; the last one is `[DONE]`, which is checked and left out."""
    with httpx.stream("POST", f"{url}/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        yield json.loads(line.removeprefix("data: "))


def refusal(response: httpx.Response, status: int = 400) -> str:
    """The message of an error, which is there in both forms."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body["object"] == "error"
    assert body["code"] == body["error"].get("code", status) or body["error"]["code"]
    assert body["message"] == body["error"]["message"]
    return str(body["message"])


# -- answers --------------------------------------------------------------------------------------


def test_one_prompt_gets_one_object(served: Served) -> None:
    answer = served.generate()
    meta = answer["meta_info"]
    assert set(answer) == {"text", "output_ids", "meta_info"}
    assert len(answer["output_ids"]) == meta["completion_tokens"] == 8
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert meta["prompt_tokens"] == 4
    assert meta["e2e_latency"] >= meta["first_token_latency"] >= meta["queue_time"] >= 0
    assert answer["text"] == served.engine.tokenizer.decode(answer["output_ids"])


def test_put_is_as_good_as_post_and_no_content_type_is_asked_for(served: Served) -> None:
    body = json.dumps({"text": "Once upon a time", "sampling_params": GREEDY})
    for method in ("PUT", "POST"):
        headers = {"content-type": "application/x-www-form-urlencoded"}  # as curl -d sends
        typed = httpx.request(method, f"{served.url}/generate", content=body, headers=headers)
        response = httpx.request(method, f"{served.url}/generate", content=body)
        assert typed.json()["text"] == response.json()["text"]
        assert response.json()["text"] == served.generate()["text"]


def test_a_list_gets_a_list_even_if_it_holds_one(served: Served) -> None:
    one, two = (served.generate(text)["text"] for text in ("Once upon", "The sea"))
    assert [each["text"] for each in served.generate(["Once upon", "The sea"])] == [one, two]
    assert [each["text"] for each in served.generate(["Once upon"])] == [one]


def test_token_ids_stand_for_the_text(served: Served) -> None:
    ids = served.engine.tokenizer.encode("Once upon a time")
    assert served.generate(None, input_ids=ids)["text"] == served.generate()["text"]
    assert len(served.generate(None, input_ids=[ids, ids[:2]])) == 2


def test_token_ids_win_over_a_text_of_the_same_shape(served: Served) -> None:
    ids = served.engine.tokenizer.encode("Once upon a time")
    assert served.generate("The sea", input_ids=ids)["text"] == served.generate()["text"]


def test_samples_come_prompt_by_prompt(served: Served) -> None:
    params = {"max_new_tokens": 4, "n": 2, "sampling_seed": 5}
    answers = served.generate(["Once upon", "The sea"], sampling_params=params)
    alone = served.generate("The sea", sampling_params=params)
    assert [each["text"] for each in answers[2:]] == [each["text"] for each in alone]
    assert alone[0]["text"] != alone[1]["text"]


def ids_of(answers: list[Any]) -> list[str]:
    return [answer["meta_info"]["id"] for answer in answers]


def test_ids_are_the_clients_and_differ(served: Served) -> None:
    texts = ["Once upon", "The sea"]
    assert served.generate(rid="one")["meta_info"]["id"] == "one"
    assert ids_of(served.generate(texts, rid=["a", "b"])) == ["a", "b"]
    assert ids_of(served.generate(texts, rid="many")) == ["many_0", "many_1"]
    sampled = {"max_new_tokens": 1, "n": 2}
    answers = served.generate(texts, rid="many", sampling_params=sampled)
    assert ids_of(answers) == ["many_0_0", "many_0_1", "many_1_0", "many_1_1"]
    assert len(set(ids_of([served.generate() for _ in range(3)]))) == 3


def test_each_prompt_may_have_its_own_parameters(served: Served) -> None:
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 3, "ignore_eos": True}]
    answers = served.generate(["a b", "c d"], sampling_params=params)
    assert [each["meta_info"]["completion_tokens"] for each in answers] == [1, 3]


def test_null_is_the_default_but_for_the_length_where_it_is_the_context(served: Served) -> None:
    params: dict[str, Any] = {
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "stop": None,
        "n": None,
    }
    assert served.generate(sampling_params={**params, "max_new_tokens": 2})
    ids = [5] * (CONTEXT - 20)
    params = {"max_new_tokens": None, "ignore_eos": True, "temperature": 0}
    meta = served.generate(None, input_ids=ids, sampling_params=params)["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 20}


def test_a_length_beyond_the_context_is_cut_silently(served: Served) -> None:
    params = {"max_new_tokens": 10**6, "ignore_eos": True, "temperature": 0}
    meta = served.generate(None, input_ids=[5] * (CONTEXT - 3), sampling_params=params)["meta_info"]
    assert meta["completion_tokens"] == 3


def test_almost_no_temperature_is_greedy(served: Served) -> None:
    params = {"max_new_tokens": 8, "temperature": 9e-7}
    assert served.generate(sampling_params=params)["text"] == served.generate()["text"]


def test_a_stop_string_is_cut_unless_it_is_to_stay(served: Served) -> None:
    text = served.generate()["text"]
    stop = text[5:8]
    params = {**GREEDY, "stop": stop}
    cut = served.generate(sampling_params=params)
    assert cut["text"] == text[: text.index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = served.generate(sampling_params={**params, "no_stop_trim": True})
    assert kept["text"] == text[: text.index(stop)] + stop
    *_, last = events(
        served.url, text="Once upon a time", sampling_params={**params, "no_stop_trim": True}
    )
    assert last["text"] == kept["text"]


def test_the_first_of_several_stops_counts(served: Served) -> None:
    text = served.generate()["text"]
    early, late = text[3:5], text[8:10]
    assert text.index(early) < text.index(late)
    for stops in ([late, early], [early, late, "never"]):
        answer = served.generate(sampling_params={**GREEDY, "stop": stops})
        assert answer["text"] == text[: text.index(early)]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": early}


def test_a_pattern_that_stopped_the_text_is_told(served: Served) -> None:
    text = served.generate()["text"]
    pattern = re.escape(text[4]) + "."
    found = re.search(pattern, text)
    assert found is not None
    answer = served.generate(sampling_params={**GREEDY, "stop_regex": [pattern]})
    assert answer["text"] == text[: found.start()]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": pattern}


def test_a_stop_token_is_told_by_its_id(served: Served) -> None:
    token = served.generate()["output_ids"][2]
    meta = served.generate(sampling_params={**GREEDY, "stop_token_ids": [None, token]})["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": token}


def test_special_tokens_are_shown_when_asked_for(served: Served) -> None:
    eos = served.engine.tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
    params = {"max_new_tokens": 2, "logit_bias": {str(eos): 100}, "ignore_eos": True}
    assert served.generate(sampling_params=params)["text"] == ""
    shown = served.generate(sampling_params={**params, "skip_special_tokens": False})
    assert shown["text"] == "<|im_end|><|im_end|>"


def test_a_bias_may_be_as_large_as_sglang_takes_it(served: Served) -> None:
    for bias in (500.0, 1e30):
        params = {**GREEDY, "max_new_tokens": 2, "logit_bias": {"400": 200.0, "401": bias}}
        assert served.generate(sampling_params=params)["output_ids"] == [401, 401]
    ask = {"prompt": "a", "max_tokens": 1, "logit_bias": {"401": 101}}
    refused = served.post("/v1/completions", **ask)
    assert refused.status_code == 400
    assert "logit_bias: must be biases in [-100, 100]" in refused.text


def test_every_chunk_tells_what_was_cached(served: Served) -> None:
    prompt = "A prompt that is long enough for a page or two of the cache to be filled by it" * 3
    served.generate(prompt)
    chunks = list(events(served.url, text=prompt, sampling_params=GREEDY))
    cached = {chunk["meta_info"]["cached_tokens"] for chunk in chunks}
    assert len(cached) == 1
    assert cached.pop() > 0


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"regex": "(cat|dog)s"}, "(cats|dogs)"),
        ({"choice": ["a.b", "c+d"]}, r"(a\.b|c\+d)"),
        ({"json_schema": '{"enum": ["x", "yes"]}'}, '("x"|"yes")'),
        ({"ebnf": 'root ::= "up" | "down"'}, "(up|down)"),
        ({"regex": "", "ebnf": "", "json_schema": ""}, "(?s:.*)"),
    ],
)
def test_grammars_hold(served: Served, grammar: dict[str, Any], pattern: str) -> None:
    text = served.generate(sampling_params={"max_new_tokens": 16, **grammar})["text"]
    assert re.fullmatch(pattern, text)


def test_the_prompts_token_ids_come_on_request(served: Served) -> None:
    answer = served.generate(return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == served.engine.tokenizer.encode("Once upon a time")


# -- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_of_output_only(served: Served) -> None:
    answer = served.generate(return_logprob=True)
    meta = answer["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs_length"] == 8
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(entry[0] <= 0 and entry[2] is None for entry in meta["output_token_logprobs"])
    assert "output_top_logprobs" not in meta


def test_logprobs_of_the_prompt_from_a_position(served: Served) -> None:
    ids = served.engine.tokenizer.encode("Once upon a time")
    body = {"return_logprob": True, "return_text_in_logprobs": True, "top_logprobs_num": 2}
    whole = served.generate(logprob_start_len=0, **body)["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in whole] == ids
    assert whole[0][0] is None  # nothing was predicted there
    assert [entry[2] for entry in whole] == ["Once", " upon", " a", " time"]
    meta = served.generate(logprob_start_len=2, **body)["meta_info"]
    assert meta["input_token_logprobs"] == [
        [pytest.approx(entry[0], abs=1e-4), *entry[1:]] for entry in whole[2:]
    ]
    assert [len(each) for each in meta["input_top_logprobs"]] == [2, 2]
    assert meta["output_top_logprobs"][0][0][1] == meta["output_token_logprobs"][0][1]
    assert served.generate(logprob_start_len=4, **body)["meta_info"]["input_token_logprobs"] == []


def test_a_place_for_logprobs_says_nothing_without_them(served: Served) -> None:
    assert served.generate(logprob_start_len=99)["text"] == served.generate()["text"]


def test_logprobs_of_named_tokens(served: Served) -> None:
    body = {"return_logprob": True, "logprob_start_len": 0, "token_ids_logprob": [10, 20]}
    meta = served.generate(**body)["meta_info"]
    assert meta["input_token_ids_logprobs"][0] is None
    for at in (*meta["input_token_ids_logprobs"][1:], *meta["output_token_ids_logprobs"]):
        assert [entry[1] for entry in at] == [10, 20]


def test_no_tokens_leave_an_empty_text_and_one_scored_position(served: Served) -> None:
    body = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
    answer = served.generate(sampling_params={"max_new_tokens": 0}, **body)
    assert (answer["text"], answer["output_ids"]) == ("", [])
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert meta["completion_tokens"] == 0
    assert len(meta["input_token_logprobs"]) == 4
    assert len(meta["output_token_logprobs"]) == 1
    plain = served.generate(sampling_params={"max_new_tokens": 0})
    assert (plain["text"], plain["output_ids"]) == ("", [])


def test_logprobs_may_differ_from_prompt_to_prompt(served: Served) -> None:
    answers = served.generate(
        ["Once upon", "The sea"],
        return_logprob=[True, False],
        logprob_start_len=[0, -1],
        token_ids_logprob=[[3], None],
        top_logprobs_num=[1, 0],
    )
    assert len(answers[0]["meta_info"]["input_token_logprobs"]) == 2
    assert "output_token_logprobs" not in answers[1]["meta_info"]


# -- streams --------------------------------------------------------------------------------------


def test_a_stream_repeats_all_so_far(served: Served) -> None:
    whole = served.generate(return_logprob=True)
    chunks = list(
        events(served.url, text="Once upon a time", sampling_params=GREEDY, return_logprob=True)
    )
    for chunk in chunks:
        assert whole["text"].startswith(chunk["text"])
        assert whole["output_ids"][: len(chunk["output_ids"])] == chunk["output_ids"]
        assert len(chunk["meta_info"]["output_token_logprobs"]) == len(chunk["output_ids"])
        assert "index" not in chunk
    assert chunks[-1]["text"] == whole["text"]
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


def test_a_stream_may_bring_what_is_new(serve: Serve) -> None:
    served = serve(incremental_streaming_output=True)
    assert served.get("/server_info").json()["incremental_streaming_output"] is True
    whole = served.generate(return_logprob=True)
    chunks = list(
        events(served.url, text="Once upon a time", sampling_params=GREEDY, return_logprob=True)
    )
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [token for chunk in chunks for token in chunk["output_ids"]] == whole["output_ids"]
    scores = [entry for chunk in chunks for entry in chunk["meta_info"]["output_token_logprobs"]]
    assert [entry[1] for entry in scores] == whole["output_ids"]


def test_chunks_of_a_list_say_whose_they_are(served: Served) -> None:
    texts: dict[int, str] = {}
    for chunk in events(served.url, text=["Once upon", "The sea"], sampling_params=GREEDY):
        texts[chunk["index"]] = chunk["text"]
    answers = served.generate(["Once upon", "The sea"])
    assert [texts[0], texts[1]] == [each["text"] for each in answers]


def test_chunks_may_be_larger(served: Served) -> None:
    params = {**GREEDY, "stream_interval": 3, "ignore_eos": True}
    chunks = list(events(served.url, text="Once upon a time", sampling_params=params))
    counts = [0, *(len(chunk["output_ids"]) for chunk in chunks)]
    steps = [after - before for before, after in pairwise(counts)]
    assert counts[-1] == 8
    assert all(step >= 3 for step in steps[:-1])


def test_a_stream_that_fails_before_it_began_has_a_status(served: Served) -> None:
    response = served.post("/generate", text="x", stream=True, rid="")
    assert "rid" in refusal(response)
    response = served.post("/generate", input_ids=[5] * CONTEXT, stream=True)
    assert "longer than the model's context length" in refusal(response)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "one of text and input_ids is needed"),
        ({"text": ""}, "prompt is empty"),
        ({"text": []}, "prompt is empty"),
        ({"text": ["a", ""]}, "prompt is empty"),
        ({"input_ids": []}, "prompt is empty"),
        ({"input_ids": [49152]}, "token id 49152 is not in [0, 49151]"),
        ({"input_ids": [-1]}, "token id -1"),
        ({"input_ids": [5] * CONTEXT}, "longer than the model's context length"),
        ({"text": "x", "sampling_params": {"max_tokens": 3}}, "no such parameter; accepted are"),
        ({"text": "x", "sampling_params": {"top_k": 0}}, "top_k"),
        ({"text": "x", "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
        ({"text": "x", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}, "at most one of them"),
        ({"text": "x", "sampling_params": {"regex": "("}}, "regex"),
        ({"text": "x", "sampling_params": {"json_schema": "{"}}, "json_schema"),
        ({"text": "x", "sampling_params": {"json_schema": {}}}, "sampling_params.json_schema"),
        ({"text": "x", "sampling_params": {"stop": ["s"] * 33}}, "sampling_params.stop"),
        ({"text": "x", "sampling_params": {"stop_regex": "é" * 129}}, "256 bytes"),
        ({"text": "x", "sampling_params": {"stop_regex": "("}}, "does not compile"),
        ({"text": "x", "sampling_params": {"logit_bias": {"a": 1}}}, "'a' is not a token id"),
        ({"text": "x", "sampling_params": {"logit_bias": {"49152": 1}}}, "token id 49152"),
        ({"text": "x", "sampling_params": {"beam_width": 2}}, "beam search"),
        ({"text": "x", "sampling_params": {"structural_tag": "{}"}}, "structural_tag"),
        ({"text": "x", "sampling_params": {"min_new_tokens": 9, "max_new_tokens": 8}}, "at most"),
        ({"text": "x", "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
        ({"text": ["x", "y"], "rid": ["a", "a"]}, "different from one another"),
        ({"text": ["x", "y"], "sampling_params": [{}]}, "1 entries for 2 prompts"),
        ({"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]}, "the same n"),
        ({"text": ["x"], "return_logprob": [True], "sampling_params": {"n": 2}}, "n > 1"),
        ({"text": "x", "lora_path": "adapter"}, "lora_path is not supported"),
        ({"text": "x", "input_embeds": [[0.5]]}, "input_embeds is not supported"),
        ({"text": "x", "session_params": {"id": "a"}}, "session_params is not supported"),
        ({"text": "x", "image_data": "aGk="}, "reads text only"),
        ({"text": 5}, "text"),
        ({"text": "x", "text_": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(
    served: Served, body: dict[str, Any], words: str
) -> None:
    response = httpx.post(f"{served.url}/generate", content=json.dumps(body))
    assert words in refusal(response)


def test_a_body_that_is_no_json_is_refused(served: Served) -> None:
    assert refusal(httpx.post(f"{served.url}/generate", content=b"{"))


def test_unknown_keys_beside_the_parameters_are_ignored(served: Served) -> None:
    assert served.generate(whatever=1, routing_key="a", log_metrics=True)


def test_one_bad_prompt_refuses_its_list_and_harms_no_other(served: Served) -> None:
    response = served.post("/generate", input_ids=[[5], [5] * CONTEXT])
    assert "longer" in refusal(response)
    assert served.generate()["meta_info"]["completion_tokens"] == 8
    served.assert_idle()


def test_a_grammar_that_the_vocabulary_cannot_spell_is_refused(served: Served) -> None:
    body = {"text": "x", "sampling_params": {"regex": "\U000b153e+"}}  # no token has its first byte
    assert "no tokens for" in refusal(served.post("/generate", **body))
    assert served.generate()["meta_info"]["completion_tokens"] == 8
