"""A strict fake of Anthropic's Messages API: versions, sampling, prefill, blocks, caching."""

from __future__ import annotations

import base64
import itertools
import json
import re
from typing import Any

from aiohttp import web

from .service import FakeService, Fault, Refused, Seen, Written, tokens_of, write

KEY = "sk-ant-fake-0123456789"
_FIELDS = {
    "model", "messages", "max_tokens", "system", "stop_sequences", "stream", "output_config",
    "thinking", "metadata", "cache_control", "service_tier",
}  # fmt: skip
_SAMPLING = {"temperature", "top_p", "top_k"}
_VERSIONS = {"2023-06-01", "2026-10-21"}
_SCHEMA_KEYWORDS = {
    "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf",
    "$ref", "$defs", "definitions", "description", "format",
}  # fmt: skip
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip


def version_of(model: str) -> tuple[int, int]:
    found = re.search(r"claude-(?:[a-z]+-)?(\d)(?:-(\d{1,2}))?(?!\d)", model)
    assert found is not None, model
    return int(found[1]), int(found[2] or 0)


class FakeAnthropic(FakeService):
    """Models by their version: ``claude-haiku-4-5``, ``claude-opus-4-6``, ``claude-sonnet-5``.

    Attributes:
        context: the longest prompt, in words.
        error_code: of the next faults.
        structured: models take an output format, whatever their version.
    """

    def __init__(self, answers: Any = "Hello world", *, context: int = 10_000) -> None:
        super().__init__(answers)
        self.context = context
        self.structured: bool | None = None
        self.prefill: bool | None = None
        self._cached: set[str] = set()
        self._ids = itertools.count(1)

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/messages", self._route)]

    def refusal(self, status: int, message: str, details: dict[str, Any]) -> dict[str, Any]:
        error: dict[str, Any] = {"type": _KINDS.get(status, "api_error"), "message": message}
        if "code" in details:
            error["details"] = {"error_code": details["code"]}
        return {"type": "error", "error": error, "request_id": "req_fake"}

    async def _route(self, request: web.Request) -> web.StreamResponse:
        return await self.handle(request, self._message)

    async def _message(
        self, request: web.Request, seen: Seen, fault: Fault | None
    ) -> web.StreamResponse:
        body = seen.body
        self._check(seen)
        schema = (body.get("output_config") or {}).get("format", {}).get("schema")
        if schema is not None:
            self._check_schema(schema, body["model"])
        if body.get("stream") is not True and body["max_tokens"] > 21_333:
            raise Refused(400, "Streaming is required for operations of this length")
        one = write(
            self.next_answer(body), body["max_tokens"], body.get("stop_sequences", ()), schema
        )
        usage = self._usage(body)
        if body.get("stream"):
            return await self.stream(request, self._events(body, one, usage), fault)
        text = [] if self.filtered else [{"type": "text", "text": one.text}]
        thinking = {"type": "thinking", "thinking": self.reasoning, "signature": "s"}
        usage["output_tokens"] = len(one.tokens)
        return web.json_response(
            {
                "id": f"msg_{next(self._ids)}",
                "type": "message",
                "role": "assistant",
                "model": body["model"],
                "content": [*([thinking] if self.reasoning else []), *text],
                "stop_reason": self._finish(one),
                "stop_sequence": one.matched,
                "usage": usage,
            }
        )

    # -- what is refused -----------------------------------------------------------------------

    def _check(self, seen: Seen) -> None:
        body, model = seen.body, seen.body.get("model", "")
        if "x-api-key" in seen.headers or seen.headers.get("authorization") != f"Bearer {KEY}":
            raise Refused(401, "invalid bearer token")
        version = seen.headers.get("anthropic-version")
        if version not in _VERSIONS:
            raise Refused(400, f"anthropic-version: {version} is not a valid version")
        if model == "no-such-model":
            raise Refused(404, "model: no-such-model")
        sampling = _SAMPLING & set(body)
        if sampling and version == "2026-10-21":
            raise Refused(400, f"{sampling.pop()}: is not supported in this API version")
        if sampling and version_of(model) > (4, 6):
            raise Refused(400, f"{sampling.pop()}: is not supported by this model")
        unknown = set(body) - _FIELDS - _SAMPLING
        if unknown:
            raise Refused(400, f"{unknown.pop()}: Extra inputs are not permitted")
        if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
            raise Refused(400, "max_tokens: Field required")
        self._check_thinking(body, sampling)
        if any(not stop.strip() for stop in body.get("stop_sequences", ())):
            raise Refused(400, "stop_sequences: each stop sequence must contain non-whitespace")
        self._check_messages(body)

    def _check_thinking(self, body: dict[str, Any], sampling: set[str]) -> None:
        thinking = body.get("thinking", {})
        if thinking.get("type") not in ("enabled", "adaptive"):
            return
        budget = thinking.get("budget_tokens", 1024 if thinking["type"] == "adaptive" else 0)
        if not 1024 <= budget < body["max_tokens"]:
            raise Refused(400, "max_tokens must be greater than thinking.budget_tokens")
        if sampling:
            raise Refused(400, f"{sampling.pop()} may not be set when thinking is enabled")
        if body["messages"][-1]["role"] == "assistant":
            raise Refused(400, "a final assistant message must start with a thinking block")

    def _check_messages(self, body: dict[str, Any]) -> None:
        messages = body.get("messages") or []
        if not messages:
            raise Refused(400, "messages: at least one message is required")
        if messages[0]["role"] != "user":
            raise Refused(400, "messages: first message must use the user role")
        words = 0
        for message in messages:
            if message["role"] not in ("user", "assistant"):
                raise Refused(400, f"messages.role: unexpected role {message['role']}")
            if not message["content"]:
                raise Refused(400, "messages.content: must be non-empty")
            for block in message["content"]:
                words += self._check_block(block)
        for block in body.get("system", ()):
            words += self._check_block(block)
        if words > self.context:
            raise Refused(400, f"prompt is too long: {words} tokens > {self.context} maximum")
        if messages[-1]["role"] == "assistant":
            able = version_of(body["model"]) <= (4, 5) if self.prefill is None else self.prefill
            if not able:
                raise Refused(
                    400,
                    "This model does not support assistant message prefill. "
                    "The conversation must end with a user message.",
                )
            text = messages[-1]["content"][-1].get("text", "")
            if text != text.rstrip():
                raise Refused(
                    400, "messages: final assistant content cannot end with trailing whitespace"
                )

    def _check_block(self, block: dict[str, Any]) -> int:
        if block["type"] == "text":
            if not block["text"].strip():
                raise Refused(400, "text content blocks must contain non-whitespace text")
            return len(tokens_of(block["text"]))
        source = block["source"]
        if source["type"] == "base64":
            if source["media_type"] not in ("image/png", "image/jpeg", "image/gif", "image/webp"):
                raise Refused(400, "image.source.base64.media_type: not supported")
            base64.b64decode(source["data"], validate=True)
        return 1

    def _check_schema(self, schema: dict[str, Any], model: str) -> None:
        able = version_of(model) >= (4, 5) if self.structured is None else self.structured
        if not able:
            raise Refused(400, "output_config.format: is not supported by this model")
        _check_closed(schema)

    # -- what is answered ----------------------------------------------------------------------

    def _finish(self, one: Written) -> str:
        if self.filtered:
            return "refusal"
        named = {"stop": "end_turn", "length": "max_tokens", "matched": "stop_sequence"}
        return named[one.finish]

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        """The prompt's words, those before a mark counted as written or read."""
        total, marked, seen = 0, 0, ""
        blocks = [*body.get("system", ())]
        for message in body["messages"]:
            blocks += message["content"]
        key = ""
        for block in blocks:
            total += len(tokens_of(block.get("text", "image")))
            seen += json.dumps({**block, "cache_control": None}, sort_keys=True)
            if "cache_control" in block:
                marked, key = total, seen
        read = marked if key in self._cached else 0
        self._cached.add(key)
        return {
            "input_tokens": total - marked,
            "cache_creation_input_tokens": marked - read,
            "cache_read_input_tokens": read,
            "output_tokens": 1,
        }

    def _events(self, body: dict[str, Any], one: Written, usage: dict[str, Any]) -> list[str]:
        message = {
            "id": f"msg_{next(self._ids)}", "type": "message", "role": "assistant",
            "model": body["model"], "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": usage,
        }  # fmt: skip
        events: list[dict[str, Any]] = [{"type": "message_start", "message": message}]
        at = 0
        if self.reasoning:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            delta = {"type": "thinking_delta", "thinking": self.reasoning}
            events += _block_events(at, block, [delta])
            at += 1
        if not self.filtered:
            deltas = [{"type": "text_delta", "text": token} for token in one.tokens]
            events += _block_events(at, {"type": "text", "text": ""}, deltas)
        events += [
            {"type": "ping"},
            {
                "type": "message_delta",
                "delta": {"stop_reason": self._finish(one), "stop_sequence": one.matched},
                "usage": {"output_tokens": len(one.tokens)},
            },
            {"type": "message_stop"},
        ]
        return [f"event: {event['type']}\ndata: {json.dumps(event)}" for event in events]


def _block_events(
    index: int, block: dict[str, Any], deltas: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": block},
        *[{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas],
        {"type": "content_block_stop", "index": index},
    ]


def _check_closed(schema: Any) -> None:
    if not isinstance(schema, dict):
        return
    unknown = set(schema) - _SCHEMA_KEYWORDS
    if unknown:
        raise Refused(400, f"output_format.schema: unsupported keyword {unknown.pop()}")
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        raise Refused(400, "For 'object' type, 'additionalProperties' must be set to false")
    for name in ("properties", "$defs", "definitions"):
        for part in schema.get(name, {}).values():
            _check_closed(part)
    _check_closed(schema.get("items"))
    for part in schema.get("anyOf", ()):
        _check_closed(part)
