"""What OpenAI's routes do beyond what the official client shows."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from .conftest import Serve, Served

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def events(served: Served, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, without the last."""
    with httpx.stream("POST", served.url + path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_models_own_template_is_applied(served: Served) -> None:
    hf = served.engine.tokenizer.hf
    text = hf.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    ids = served.engine.tokenizer.encode(str(text), add_special_tokens=False)
    answer = served.post(CHAT, messages=HELLO, max_tokens=4, temperature=0).json()
    params = {"max_new_tokens": 4, "temperature": 0}
    alone = served.generate(None, input_ids=ids, sampling_params=params)
    assert answer["choices"][0]["message"]["content"] == alone["text"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["model"] == "tiny"


def test_a_chat_right_after_a_start_without_transformers_has_its_template(serve: Serve) -> None:
    ask = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
    answers = [serve().post(CHAT, **ask).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"] > 1


def test_parts_of_text_are_joined_and_images_refused(served: Served) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    ask = {"max_tokens": 4, "temperature": 0}
    whole = served.post(CHAT, messages=HELLO, **ask).json()["choices"]
    split = served.post(CHAT, messages=[{"role": "user", "content": parts}], **ask).json()
    assert split["choices"] == whole
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    response = served.post(CHAT, messages=[{"role": "user", "content": [image]}])
    assert response.status_code == 400
    assert "reads text only" in response.json()["error"]["message"]


def test_what_stopped_the_text_is_told(served: Served) -> None:
    ask = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
    text = served.post(CHAT, **ask).json()["choices"][0]["message"]["content"]
    choice = served.post(CHAT, **ask, stop=[text[4:7]]).json()["choices"][0]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", text[4:7])
    assert choice["message"]["content"] == text[: text.index(text[4:7])]


def test_a_stream_of_samples_has_an_end_for_each(served: Served) -> None:
    ask = {"messages": HELLO, "max_tokens": 3, "n": 2, "seed": 3, "logprobs": True}
    whole = served.post(CHAT, **ask).json()
    chunks = events(served, CHAT, **ask, stream_options={"include_usage": True})
    texts, ends = {0: "", 1: ""}, {}
    tokens: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["logprobs"]:
            tokens[choice["index"]] += choice["logprobs"]["content"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    for choice in whole["choices"]:
        assert texts[choice["index"]] == choice["message"]["content"]
        assert ends[choice["index"]] == choice["finish_reason"]
        assert [entry["token"] for entry in tokens[choice["index"]]] == [
            entry["token"] for entry in choice["logprobs"]["content"]
        ]
    assert chunks[-1]["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {
        "prompt_tokens_details": None
    }


def test_usage_with_every_chunk(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(
        served, CHAT, messages=HELLO, max_tokens=3, ignore_eos=True, stream_options=options
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 3


def test_completions_default_to_sixteen_tokens_and_chats_to_the_context(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="Once upon", ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 16
    ids = [5] * 2000
    stop = served.post("/v1/completions", prompt=ids, max_tokens=5000, ignore_eos=True).json()
    assert stop["usage"]["completion_tokens"] == 48


def test_an_echoed_prompt_comes_first_in_a_stream(served: Served) -> None:
    ask = {"prompt": ["Once upon", "The sea"], "max_tokens": 2, "echo": True, "temperature": 0}
    whole = served.post("/v1/completions", **ask).json()["choices"]
    texts = {0: "", 1: ""}
    for chunk in events(served, "/v1/completions", **ask):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(texts.values()) == [choice["text"] for choice in whole]
    assert whole[1]["text"].startswith("The sea")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {}, "messages: Field required"),
        (CHAT, {"messages": HELLO, "continue_final_message": True}, "last message of the assist"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "needs logprobs"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "schema is needed"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format"),
        (
            CHAT,
            {"messages": HELLO, "regex": "a", "response_format": {"type": "json_object"}},
            "another grammar",
        ),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": True}}, "are ours"),
        (CHAT, {"messages": HELLO, "n": 0}, "n: Input should be"),
        (CHAT, {"messages": HELLO, "guided_json": {"type": "object"}}, "send response_format"),
        (CHAT, {"messages": HELLO, "input_ids": [5]}, "send them to /v1/completions"),
        (CHAT, {"messages": HELLO, "return_token_ids": True}, "output_ids"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "a"}}, "send resp"),
        ("/v1/tokenize", {}, "one of prompt and messages"),
        ("/v1/tokenize", {"prompt": "x", "messages": HELLO}, "one of prompt and messages"),
        ("/v1/completions", {"prompt": ""}, "prompt is empty"),
        ("/v1/completions", {"prompt": []}, "prompt is empty"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("/v1/detokenize", {"tokens": [49152]}, "not in [0, 49151]"),
    ],
)
def test_refusals(served: Served, path: str, body: dict[str, Any], words: str) -> None:
    response = served.post(path, **body)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


def test_messages_have_the_tokens_that_a_chat_has(served: Served) -> None:
    usage = served.post(CHAT, messages=HELLO, max_tokens=1).json()["usage"]
    found = served.post("/v1/tokenize", messages=HELLO).json()
    assert found["count"] == len(found["tokens"]) == usage["prompt_tokens"]
    closed = served.post("/v1/tokenize", messages=HELLO, add_generation_prompt=False).json()
    assert found["tokens"][: closed["count"]] == closed["tokens"]
    assert closed["count"] < found["count"]


def test_a_token_that_is_half_a_character_has_its_own_bytes(served: Served) -> None:
    ids = served.engine.tokenizer.encode("🙂")
    assert len(ids) > 1
    biased = {str(ids[0]): 100}
    ask = {"messages": HELLO, "max_tokens": 1, "temperature": 0, "logprobs": True}
    answer = served.post(CHAT, **ask, logit_bias=biased).json()
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "\ufffd"
    assert "🙂".encode().startswith(bytes(entry["bytes"]))


def test_openai_routes_insist_on_json(served: Served) -> None:
    body = json.dumps({"messages": HELLO})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # the latter is curl's
        response = httpx.post(served.url + CHAT, content=body, headers={"content-type": kind})
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert message == f"Content-Type: this route takes application/json, not {kind}"


def test_routes_that_are_not_there_are_told(served: Served) -> None:
    gone = served.post("/v1/embeddings", input="x")
    assert gone.status_code == 404
    assert "no route POST /v1/embeddings" in gone.json()["error"]["message"]
    wrong = served.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "this route takes POST" in wrong.json()["error"]["message"]


def test_a_text_survives_tokens(served: Served) -> None:
    for text in ("Once upon a time", "Grüße, 世界 🙂", ""):
        tokens = served.post("/v1/tokenize", prompt=text).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert served.post("/v1/detokenize", tokens=tokens["tokens"]).json() == {"text": text}
    many = served.post("/tokenize", prompt=["a b c", "d"]).json()
    assert many["count"] == [3, 1]
    assert served.post("/detokenize", tokens=many["tokens"]).json() == {"text": ["a b c", "d"]}
