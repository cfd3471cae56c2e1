"""A strict fake of OpenAI's wire: chat, completions and decisions, plain and as Azure has them."""

from __future__ import annotations

import base64
import itertools
import json
import re
from typing import Any

from aiohttp import web

from .service import FakeService, Fault, Refused, Seen, Written, tokens_of, write

KEY = "sk-fake-0123456789abcdef"
_CHAT_FIELDS = {
    "model", "messages", "max_tokens", "max_completion_tokens", "n", "stop", "temperature",
    "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "logprobs",
    "top_logprobs", "response_format", "stream", "stream_options", "reasoning_effort",
    "service_tier",
}  # fmt: skip
_TEXT_FIELDS = {
    "model", "prompt", "max_tokens", "n", "stop", "temperature", "top_p", "frequency_penalty",
    "presence_penalty", "logit_bias", "seed", "logprobs", "echo", "best_of", "stream",
    "stream_options",
}  # fmt: skip
_STRICT_KEYWORDS = {
    "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf",
    "$ref", "$defs", "definitions", "description", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems",
}  # fmt: skip
_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,(.+)", re.DOTALL)


def unsupported(parameter: str, message: str = "") -> Refused:
    return Refused(
        400,
        message or f"Unsupported parameter: '{parameter}' is not supported with this model.",
        code="unsupported_parameter",
        param=parameter,
    )


class FakeOpenAI(FakeService):
    """Models by name: ``gpt-4o`` and other chat models, ``o3``, ``gpt-5.5``, ``gpt-6-luna``,
    and everything at ``/completions``.

    Attributes:
        context: the longest prompt, in words.
        refuses: parameters that the service refuses in addition.
        echoes: it gives logprobs of echoed prompts.
        decides: it has the Decisions API.
        vocabulary: of its completion models, where prompts come as tokens; the last one ends
            texts, and has none.
    """

    def __init__(self, answers: Any = "Hello world", *, context: int = 10_000) -> None:
        super().__init__(answers)
        self.context = context
        self.refuses: set[str] = set()
        self.echoes = True
        self.decides = True
        self.vocabulary: list[str] = []
        self._ids = itertools.count(1)

    def routes(self) -> list[web.RouteDef]:
        paths = []
        for prefix in ("/v1", "/openai/v1"):
            paths += [
                web.post(f"{prefix}/chat/completions", self._chat_route),
                web.post(f"{prefix}/completions", self._text_route),
                web.post(f"{prefix}/decisions", self._decision_route),
            ]
        azure = "/openai/deployments/{deployment}"
        paths += [
            web.post(f"{azure}/chat/completions", self._azure_chat_route),
            web.post(f"{azure}/completions", self._azure_text_route),
        ]
        return paths

    def refusal(self, status: int, message: str, details: dict[str, Any]) -> dict[str, Any]:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return {"error": {"message": message, "type": kind, "param": None, "code": None} | details}

    # -- routes ------------------------------------------------------------------------------

    async def _chat_route(self, request: web.Request) -> web.StreamResponse:
        return await self.handle(request, self._chat)

    async def _text_route(self, request: web.Request) -> web.StreamResponse:
        return await self.handle(request, self._text)

    async def _decision_route(self, request: web.Request) -> web.StreamResponse:
        return await self.handle(request, self._decision)

    async def _azure_chat_route(self, request: web.Request) -> web.StreamResponse:
        return await self.handle(request, self._chat)

    async def _azure_text_route(self, request: web.Request) -> web.StreamResponse:
        return await self.handle(request, self._text)

    def _authorize(self, request: web.Request, seen: Seen) -> None:
        azure = request.path.startswith("/openai/deployments/")
        if azure and not request.query.get("api-version"):
            raise Refused(404, "Resource not found", code="404")
        key = seen.headers.get("api-key") if azure else None
        key = key or seen.headers.get("authorization", "").removeprefix("Bearer ")
        if key != KEY:
            raise Refused(401, f"Incorrect API key provided: {key[:8]}***", code="invalid_api_key")
        if azure:
            seen.body["model"] = request.match_info["deployment"]
        if seen.body.get("model") == "no-such-model":
            raise Refused(404, "The model `no-such-model` does not exist", code="model_not_found")

    # -- chat --------------------------------------------------------------------------------

    async def _chat(
        self, request: web.Request, seen: Seen, fault: Fault | None
    ) -> web.StreamResponse:
        self._authorize(request, seen)
        body = seen.body
        self._check_chat(body)
        schema = None
        if "response_format" in body:
            schema = self._schema(body["response_format"])
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        written = [
            write(self.next_answer(body), limit, stops, schema) for _ in range(body.get("n", 1))
        ]
        prompt = sum(len(tokens_of(_text_of(message))) for message in body["messages"])
        usage = _usage(prompt, written, _reasoning_tokens(body["model"]))
        self.charge(usage["total_tokens"])
        if body.get("stream"):
            return await self.stream(request, self._chat_events(body, written, usage), fault)
        return web.json_response(self._chat_reply(body, written, usage))

    def _check_chat(self, body: dict[str, Any]) -> None:
        unknown = set(body) - _CHAT_FIELDS
        if unknown:
            raise Refused(400, f"Unrecognized request argument supplied: {unknown.pop()}")
        for name in self.refuses & set(body):
            raise unsupported(name)
        _check_model_rules(body)
        if not body.get("messages"):
            raise Refused(400, "[] is too short - 'messages'", param="messages")
        words = 0
        for message in body["messages"]:
            _check_message(message)
            words += len(tokens_of(_text_of(message)))
        if words > self.context:
            raise Refused(
                400,
                f"This model's maximum context length is {self.context} tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        if "max_tokens" in body and "max_completion_tokens" in body:
            raise Refused(400, "Setting both max_tokens and max_completion_tokens is not allowed")
        if not 1 <= (body.get("max_completion_tokens") or body.get("max_tokens") or 1) <= 100_000:
            raise Refused(400, "Invalid max_tokens", param="max_tokens")
        if len(body.get("stop") or []) > 4 and not isinstance(body["stop"], str):
            raise Refused(400, "Invalid 'stop': array too long", param="stop")
        if body.get("top_logprobs") is not None and not body.get("logprobs"):
            raise Refused(400, "'logprobs' must be true", param="top_logprobs")
        if "stream_options" in body and not body.get("stream"):
            raise Refused(400, "stream_options needs stream", param="stream_options")

    def _schema(self, form: dict[str, Any]) -> dict[str, Any]:
        if form.get("type") != "json_schema":
            raise Refused(400, "Invalid response_format", param="response_format")
        described = form["json_schema"]
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", described.get("name", "")):
            raise Refused(400, "Invalid name", param="response_format.json_schema.name")
        schema: dict[str, Any] = described["schema"]
        if schema.get("type") != "object":
            raise Refused(400, "schema must be of type object", code="invalid_json_schema")
        if described.get("strict"):
            _check_strict(schema)
        return schema

    def _chat_reply(
        self, body: dict[str, Any], written: list[Written], usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{next(self._ids)}",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": None if self.refusal_text or self.filtered else one.text,
                        "refusal": self.refusal_text or None,
                        **({"reasoning_content": self.reasoning} if self.reasoning else {}),
                    },
                    "finish_reason": self._finish(one),
                    "logprobs": _chat_logprobs(one, body),
                }
                for index, one in enumerate(written)
            ],
            "usage": usage,
        }

    def _finish(self, one: Written) -> str:
        if self.filtered:
            return "content_filter"
        return "length" if one.finish == "length" else "stop"

    def _chat_events(
        self, body: dict[str, Any], written: list[Written], usage: dict[str, Any]
    ) -> list[str]:
        head = {
            "id": f"chatcmpl-{next(self._ids)}",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": body["model"],
        }

        def chunk(index: int, delta: dict[str, Any], finish: str | None = None,
                  logprobs: Any = None) -> dict[str, Any]:  # fmt: skip
            choice = {"index": index, "delta": delta, "finish_reason": finish}
            return {**head, "choices": [choice | {"logprobs": logprobs}]}

        events = [chunk(i, {"role": "assistant", "content": ""}) for i in range(len(written))]
        for index, one in enumerate(written):
            if self.reasoning:
                events.append(chunk(index, {"reasoning_content": self.reasoning}))
            if self.refusal_text:
                events.append(chunk(index, {"refusal": self.refusal_text}))
            elif not self.filtered:
                for token in one.tokens:
                    logprobs = _chat_logprobs(Written((token,), "stop"), body)
                    events.append(chunk(index, {"content": token}, None, logprobs))
        events += [chunk(i, {}, self._finish(one)) for i, one in enumerate(written)]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({**head, "choices": [], "usage": usage})
        return [f"data: {json.dumps(event)}" for event in events] + ["data: [DONE]"]

    # -- completions -------------------------------------------------------------------------

    async def _text(
        self, request: web.Request, seen: Seen, fault: Fault | None
    ) -> web.StreamResponse:
        self._authorize(request, seen)
        body = seen.body
        unknown = set(body) - _TEXT_FIELDS
        if unknown:
            raise Refused(400, f"Unrecognized request argument supplied: {unknown.pop()}")
        for name in self.refuses & set(body):
            raise unsupported(name)
        if body.get("logprobs") is not None and body["logprobs"] > 5:
            raise Refused(400, "logprobs must be at most 5", param="logprobs")
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        if isinstance(prompts[0], int):
            return web.json_response(self._biased(body, body["prompt"]))
        if body.get("echo"):
            if not self.echoes:
                raise Refused(
                    400, "Setting 'echo' and 'logprobs' at the same time is not supported"
                )
            return web.json_response(self._echo(body, prompts))
        if not body.get("max_tokens", 16):
            raise Refused(400, "max_tokens must be at least 1", param="max_tokens")
        stops = body.get("stop") or []
        written = [
            write(self.next_answer(body), body.get("max_tokens", 16), stops, None)
            for _ in range(body.get("n", 1))
        ]
        usage = _usage(len(tokens_of(prompts[0])), written, 0)
        head = {"id": f"cmpl-{next(self._ids)}", "object": "text_completion", "created": 1,
                "model": body["model"]}  # fmt: skip
        if body.get("stream"):
            events = [
                {**head, "choices": [{"index": i, "text": token, "finish_reason": None,
                                      "logprobs": _text_logprobs((token,), body)}]}
                for i, one in enumerate(written)
                for token in one.tokens
            ]  # fmt: skip
            events += [
                {**head, "choices": [{"index": i, "text": "", "finish_reason": self._finish(one),
                                      "logprobs": None}]}
                for i, one in enumerate(written)
            ]  # fmt: skip
            if (body.get("stream_options") or {}).get("include_usage"):
                events.append({**head, "choices": [], "usage": usage})
            lines = [f"data: {json.dumps(event)}" for event in events] + ["data: [DONE]"]
            return await self.stream(request, lines, fault)
        choices = [
            {"index": i, "text": one.text, "finish_reason": self._finish(one),
             "logprobs": _text_logprobs(one.tokens, body)}
            for i, one in enumerate(written)
        ]  # fmt: skip
        return web.json_response({**head, "choices": choices, "usage": usage})

    def _echo(self, body: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
        choices = []
        for index, prompt in enumerate(prompts):
            tokens = tokens_of(prompt)
            offsets = [sum(map(len, tokens[:at])) for at in range(len(tokens))]
            values = [self.logprob_of.get(token.strip(), -5.0) for token in tokens]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [None, *values[1:]],
                "top_logprobs": [None, *[{token: -1.0} for token in tokens[1:]]],
                "text_offset": offsets,
            }
            choices.append(
                {"index": index, "text": prompt, "finish_reason": "length", "logprobs": logprobs}
            )
        total = sum(len(tokens_of(prompt)) for prompt in prompts)
        usage = {"prompt_tokens": total, "completion_tokens": 0, "total_tokens": total}
        return {"id": "cmpl-echo", "object": "text_completion", "created": 1,
                "model": body["model"], "choices": choices, "usage": usage}  # fmt: skip

    def _biased(self, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        """The one token of those with a bias that the scripted answer goes on with."""
        if body["max_tokens"] != 1 or any(value != 100 for value in body["logit_bias"].values()):
            raise Refused(400, "the fake takes one token of those with a bias of 100")
        said, answer = "".join(self.vocabulary[token] for token in prompt), self.next_answer(body)

        def fit(token: int) -> int:
            text = said + self.vocabulary[token]
            ends = [k for k in range(1, len(answer) + 1) if text.endswith(answer[:k])]
            whole = token == len(self.vocabulary) - 1
            return max(ends, default=0) if not whole or said.endswith(answer) else -1

        token = max(map(int, body["logit_bias"]), key=fit)
        choice = {
            "index": 0,
            "text": self.vocabulary[token],
            "finish_reason": "length" if self.vocabulary[token] else "stop",
            "logprobs": None,
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1}
        return {"id": "cmpl-biased", "object": "text_completion", "created": 1,
                "model": body["model"], "choices": [choice],
                "usage": {**usage, "total_tokens": len(prompt) + 1}}  # fmt: skip

    # -- decisions ---------------------------------------------------------------------------

    async def _decision(
        self, request: web.Request, seen: Seen, fault: Fault | None
    ) -> web.StreamResponse:
        self._authorize(request, seen)
        body = seen.body
        if not self.decides:
            raise Refused(404, "Invalid URL (POST /v1/decisions)")
        if not body["model"].startswith("gpt-6-luna"):
            raise Refused(400, "The model does not support decisions", param="model")
        answers = []
        for question in body["questions"]:
            values = [choice["value"] for choice in question["choices"]]
            if not 2 <= len(values) <= 255 or len(set(values)) != len(values):
                raise Refused(400, "Provide between 2 and 255 choices", param="questions")
            chosen = self.next_answer(body)
            rest = 0.1 / max(len(values) - 1, 1)
            answers.append(
                {
                    "type": "choice",
                    "choice": chosen,
                    "confidence": 0.9,
                    "name": None,
                    "probabilities": [
                        {"value": value, "probability": 0.9 if value == chosen else rest}
                        for value in values
                    ],
                }
            )
        usage = {
            "input_tokens": 20,
            "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 4},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 20,
        }
        return web.json_response({"answers": answers, "model": body["model"], "usage": usage})


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _check_message(message: dict[str, Any]) -> None:
    if message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
        raise Refused(400, f"Invalid value: {message.get('role')!r}", param="messages[0].role")
    content = message.get("content")
    if isinstance(content, str):
        return
    if not content:
        raise Refused(400, "Invalid value for 'content': expected a string", param="messages")
    for part in content:
        if part["type"] == "text" and not part["text"]:
            raise Refused(400, "text content blocks must be non-empty", param="messages")
        if part["type"] == "image_url":
            if message["role"] != "user":
                raise Refused(400, "Image URLs are only allowed for messages with role 'user'")
            _check_image(part["image_url"]["url"])


def _check_image(url: str) -> None:
    if url.startswith(("http://", "https://")):
        return
    found = _IMAGE.fullmatch(url)
    if found is None:
        raise Refused(400, "You uploaded an unsupported image.", code="invalid_image_format")
    base64.b64decode(found[2], validate=True)


def _check_model_rules(body: dict[str, Any]) -> None:
    model = body["model"]
    o_series = re.match(r"o\d", model) is not None
    found = re.match(r"gpt-(\d+)", model)
    gpt5 = found is not None and int(found[1]) >= 5 and "chat" not in model
    if not (o_series or gpt5):
        return
    if "max_tokens" in body:
        raise unsupported("max_tokens", "Use 'max_completion_tokens' instead.")
    refused = {"frequency_penalty", "presence_penalty", "stop"}
    if o_series:
        refused |= {"top_p", "logprobs", "top_logprobs"}
    else:
        refused |= {"logit_bias"}
        if body.get("reasoning_effort") != "none":
            refused |= {"top_p", "logprobs", "top_logprobs"}
    for name in refused & set(body):
        raise unsupported(name)
    free = gpt5 and body.get("reasoning_effort") == "none"
    if body.get("temperature", 1) != 1 and not free:
        raise Refused(
            400, "Only the default (1) value is supported.", code="unsupported_value",
            param="temperature",
        )  # fmt: skip


def _check_strict(schema: Any) -> None:
    if not isinstance(schema, dict):
        return
    unknown = set(schema) - _STRICT_KEYWORDS
    if unknown:
        raise Refused(400, f"'{unknown.pop()}' is not permitted", code="invalid_json_schema")
    if schema.get("type") == "object":
        properties = schema.get("properties", {})
        closed = schema.get("additionalProperties") is False
        if not closed or set(schema.get("required", ())) != set(properties):
            raise Refused(400, "'additionalProperties' must be false", code="invalid_json_schema")
    for name in ("properties", "$defs", "definitions"):
        for part in schema.get(name, {}).values():
            _check_strict(part)
    _check_strict(schema.get("items"))
    for part in schema.get("anyOf", ()):
        _check_strict(part)


def _reasoning_tokens(model: str) -> int:
    return 7 if re.match(r"o\d|gpt-[56]", model) else 0


def _usage(prompt: int, written: list[Written], reasoning: int) -> dict[str, Any]:
    answer = sum(len(one.tokens) for one in written) + reasoning
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": min(prompt, 3)},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _chat_logprobs(one: Written, body: dict[str, Any]) -> dict[str, Any] | None:
    if not body.get("logprobs"):
        return None
    top = [{"token": "x", "logprob": -2.0, "bytes": None}] * (body.get("top_logprobs") or 0)
    return {
        "content": [
            {"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": top}
            for token in one.tokens
        ],
        "refusal": None,
    }


def _text_logprobs(tokens: tuple[str, ...], body: dict[str, Any]) -> dict[str, Any] | None:
    if body.get("logprobs") is None:
        return None
    return {
        "tokens": list(tokens),
        "token_logprobs": [-0.5] * len(tokens),
        "top_logprobs": [{token: -0.5} for token in tokens],
        "text_offset": [0] * len(tokens),
    }
