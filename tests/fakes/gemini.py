"""A strict fake of Gemini's wire, by key as the developer API has it and by project as Vertex."""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

from aiohttp import web

from .service import FakeService, Fault, Refused, Seen, Written, tokens_of, write

KEY = "AIza-fake-0123456789"
TOKEN = "ya29.fake-0123456789"
_CONFIG = {
    "temperature", "topP", "topK", "candidateCount", "maxOutputTokens", "stopSequences",
    "responseLogprobs", "logprobs", "presencePenalty", "frequencyPenalty", "seed",
    "responseMimeType", "responseJsonSchema", "thinkingConfig",
}  # fmt: skip
_BODY = {"contents", "systemInstruction", "generationConfig", "safetySettings", "labels"}
_STATUS = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE",
}  # fmt: skip
_NO_KEYWORDS = {"pattern", "minLength", "maxLength", "not", "allOf"}


class FakeGemini(FakeService):
    """``models/M:generateContent`` and ``:streamGenerateContent`` in both addresses.

    Attributes:
        context: the longest prompt, in words.
        blocked: why prompts are refused, if they are.
        finish: why answers end, where it is not one of the usual reasons.
    """

    def __init__(self, answers: Any = "Hello world", *, context: int = 10_000) -> None:
        super().__init__(answers)
        self.context = context
        self.blocked = ""
        self.finish = ""
        self._ids = itertools.count(1)

    def routes(self) -> list[web.RouteDef]:
        vertex = "/{version}/projects/{project}/locations/{location}/publishers/google/models"
        return [
            web.post("/{version}/models/{call}", self._route),
            web.post(f"{vertex}/{{call}}", self._route),
        ]

    def refusal(self, status: int, message: str, details: dict[str, Any]) -> dict[str, Any]:
        error: dict[str, Any] = {
            "code": status,
            "message": message,
            "status": _STATUS.get(status, "UNKNOWN"),
        }
        if "delay" in details:
            error["details"] = [{"@type": "RetryInfo", "retryDelay": details["delay"]}]
        return {"error": error}

    async def is_stream(self, request: web.Request) -> bool:
        return request.path.endswith(":streamGenerateContent")

    async def _route(self, request: web.Request) -> web.StreamResponse:
        return await self.handle(request, self._generate)

    async def _generate(
        self, request: web.Request, seen: Seen, fault: Fault | None
    ) -> web.StreamResponse:
        model, _, method = request.match_info["call"].partition(":")
        streamed = method == "streamGenerateContent"
        if method not in ("generateContent", "streamGenerateContent"):
            raise Refused(404, f"no method {method}")
        self._authorize(request, seen, model)
        body = seen.body
        config = body.get("generationConfig", {})
        self._check(body, config)
        if self.blocked:
            feedback = {"blockReason": self.blocked, "safetyRatings": [
                {"category": "HARM_CATEGORY_HARASSMENT", "probability": "HIGH", "blocked": True}
            ]}  # fmt: skip
            blocked = {"promptFeedback": feedback, "modelVersion": model}
            if streamed:
                return await self.stream(request, [f"data: {json.dumps(blocked)}"], None)
            return web.json_response(blocked)
        one = write(
            self.next_answer(body),
            config.get("maxOutputTokens"),
            config.get("stopSequences", ()),
            config.get("responseJsonSchema"),
        )
        usage = self._usage(body, one)
        if streamed:
            return await self.stream(request, self._events(model, config, one, usage), fault)
        return web.json_response(self._reply(model, config, one.tokens, self._finish(one), usage))

    # -- what is refused -----------------------------------------------------------------------

    def _authorize(self, request: web.Request, seen: Seen, model: str) -> None:
        if "project" in request.match_info:
            if seen.headers.get("authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Request had invalid authentication credentials.")
        elif seen.headers.get("x-goog-api-key") != KEY:
            raise Refused(400, "API key not valid. Please pass a valid API key.")
        if model == "no-such-model":
            raise Refused(404, "models/no-such-model is not found")

    def _check(self, body: dict[str, Any], config: dict[str, Any]) -> None:
        for known, given in ((_BODY, body), (_CONFIG, config)):
            unknown = set(given) - known
            if unknown:
                raise Refused(400, f'Invalid JSON payload received. Unknown name "{unknown.pop()}"')
        if not body.get("contents"):
            raise Refused(400, "contents is not specified")
        words = 0
        for content in body["contents"]:
            if content.get("role") not in ("user", "model"):
                raise Refused(400, "Please use a valid role: user, model.")
            if not content.get("parts"):
                raise Refused(400, "must include at least one parts field")
            for part in content["parts"]:
                words += self._check_part(part)
        if body["contents"][-1]["role"] != "user":
            raise Refused(400, "Please ensure that multiturn requests end with a user role")
        if words > self.context:
            raise Refused(
                400,
                f"The input token count ({words}) exceeds the maximum number of tokens allowed "
                f"({self.context}).",
            )
        if len(config.get("stopSequences", ())) > 5:
            raise Refused(400, "at most 5 stop sequences")
        if "logprobs" in config and not config.get("responseLogprobs"):
            raise Refused(400, "logprobs needs responseLogprobs")
        if "responseJsonSchema" in config:
            if config.get("responseMimeType") != "application/json":
                raise Refused(400, "response schema needs the type application/json")
            if _NO_KEYWORDS & set(json.dumps(config["responseJsonSchema"]).split('"')):
                raise Refused(400, "unsupported keyword in the schema")

    def _check_part(self, part: dict[str, Any]) -> int:
        if "text" in part:
            if not part["text"]:
                raise Refused(400, "empty text parameter")
            return len(tokens_of(part["text"]))
        if "inlineData" in part:
            data = part["inlineData"]
            kind = data.get("mimeType") or data["mime_type"]  # protobuf's JSON takes both
            if not kind.startswith("image/"):
                raise Refused(400, "Unsupported MIME type")
            base64.urlsafe_b64decode(data["data"])
        return 1

    # -- what is answered ----------------------------------------------------------------------

    def _finish(self, one: Written) -> str:
        if self.filtered:
            return "SAFETY"
        if self.finish:
            return self.finish
        return "MAX_TOKENS" if one.finish == "length" else "STOP"

    def _usage(self, body: dict[str, Any], one: Written) -> dict[str, Any]:
        prompt = sum(
            len(tokens_of(part.get("text", "image")))
            for content in body["contents"]
            for part in content["parts"]
        )
        return {
            "promptTokenCount": prompt,
            "candidatesTokenCount": len(one.tokens),
            "thoughtsTokenCount": 5 if self.reasoning else 0,
            "totalTokenCount": prompt + len(one.tokens),
            "cachedContentTokenCount": min(prompt, 2),
        }

    def _reply(
        self,
        model: str,
        config: dict[str, Any],
        tokens: tuple[str, ...],
        finish: str | None,
        usage: dict[str, Any] | None,
        *,
        think: bool = True,
    ) -> dict[str, Any]:
        thoughts = [{"text": self.reasoning, "thought": True}] if self.reasoning and think else []
        text = "" if self.filtered else "".join(tokens)
        candidate: dict[str, Any] = {"index": 0}
        if text or thoughts:
            parts = [*thoughts, *([{"text": text}] if text else [])]
            candidate["content"] = {"role": "model", "parts": parts}
        if finish is not None:
            candidate["finishReason"] = finish
        if config.get("responseLogprobs") and tokens:
            chosen = [{"token": t, "tokenId": 1, "logProbability": -0.5} for t in tokens]
            top = [{"candidates": [one] * (config.get("logprobs") or 0)} for one in chosen]
            candidate["logprobsResult"] = {"chosenCandidates": chosen, "topCandidates": top}
        reply: dict[str, Any] = {
            "candidates": [candidate],
            "modelVersion": model,
            "responseId": f"response-{next(self._ids)}",
        }
        return reply | ({"usageMetadata": usage} if usage is not None else {})

    def _events(
        self, model: str, config: dict[str, Any], one: Written, usage: dict[str, Any]
    ) -> list[str]:
        replies = [
            self._reply(model, config, (token,), None, None, think=at == 0)
            for at, token in enumerate(one.tokens)
        ]
        replies.append(self._reply(model, config, (), self._finish(one), usage, think=False))
        return [f"data: {json.dumps(reply)}" for reply in replies]
