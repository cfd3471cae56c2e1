"""The body of `/generate`, as SGLang's clients send it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AbortBody", "GenerateBody", "ProfileBody", "SamplingBody"]

Texts = Annotated[list[str], Field(max_length=32)]


class SamplingBody(BaseModel):
    """`sampling_params`; null means the default, except for `max_new_tokens`."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int | None = Field(
        default=128, ge=0, description="null: until the context is full; 0: only score the prompt"
    )
    min_new_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="-1 or null: all")
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    stop: str | Texts | None = None
    stop_token_ids: list[int | None] | None = None
    stop_regex: str | Texts | None = None
    n: int | None = Field(default=None, ge=1, le=1024)
    json_schema: str | None = Field(default=None, description="a JSON string")
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    choice: list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    stream_interval: int | None = Field(default=None, ge=1)
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    beam_width: int | None = None
    custom_params: dict[str, Any] | None = None
    watermark: dict[str, Any] | None = None


class GenerateBody(BaseModel):
    """One prompt or several; keys that are not known here are ignored."""

    model_config = ConfigDict(extra="allow")

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: str | list[str] | None = Field(default=None, description="unique among running requests")
    stream: bool = False
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int] | list[list[int] | None] | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    image_data: Any = None
    priority: int | None = None
    extra_key: str | list[str] | None = None
    cache_salt: str | list[str] | None = None


class AbortBody(BaseModel):
    """Which requests to end."""

    rid: str = ""
    abort_all: bool = False
    prefix: bool = Field(default=False, description="all requests whose id begins with `rid`")
    abort_message: str | None = None


class ProfileBody(BaseModel):
    """What to record; the trace goes to the folder the server was started with."""

    model_config = ConfigDict(extra="allow")

    with_stack: bool | None = None
    record_shapes: bool | None = None
    activities: list[str] | None = None
