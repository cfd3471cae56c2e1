"""What a request may say."""

from __future__ import annotations

import pickle

import pytest

from asyncsgl_engine.errors import InvalidRequest, Overloaded, PromptTooLong
from asyncsgl_engine.request import Grammar, Request, Sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", 129),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("min_p", 2.0),
        ("frequency_penalty", 3.0),
        ("presence_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", ((1, 2e6),)),
        ("seed", 2**64),
    ],
)
def test_sampling_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: must be") as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_requests_are_checked_too() -> None:
    with pytest.raises(InvalidRequest, match="at least one token"):
        Request("r", ())
    with pytest.raises(InvalidRequest, match=r"logprob_start_len: must be -1 or in \[0, 1\]"):
        Request("r", (1, 2), return_logprob=True, logprob_start_len=2)
    with pytest.raises(InvalidRequest, match="return_logprob"):
        Request("r", (1, 2), top_logprobs_num=1)
    with pytest.raises(InvalidRequest, match=r"grammar\.kind"):
        Grammar("yaml", "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [InvalidRequest("a", "b"), PromptTooLong(5, 4, "c"), Overloaded(3, 2)]
)
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
