"""Runs and generations as OpenTelemetry spans.

Attribute names are those of the GenAI semantic conventions
(https://opentelemetry.io/docs/specs/semconv/gen-ai/). Prompts and answers are not recorded.
"""

from __future__ import annotations

from ._optional import needs
from .program.events import (
    Event,
    Listener,
    Path,
    RunFinished,
    Text,
    VariableFailed,
    VariableFinished,
    VariableStarted,
)
from .types import GenRequest, Meta

with needs("otel"):
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        Span,
        SpanKind,
        Status,
        StatusCode,
        Tracer,
        TracerProvider,
        get_tracer,
        set_span_in_context,
    )

__all__ = ["OpenTelemetryInstrument"]

_REQUEST_ATTRIBUTES = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "stop": "gen_ai.request.stop_sequences",
    "n": "gen_ai.request.choice.count",
}


class OpenTelemetryInstrument:
    """A span for each run, and in it one for each generation.

    Install it with :func:`asyncsgl.telemetry.add_instrument`.

    Args:
        tracer_provider: where spans go; the process-wide one unless given.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = get_tracer("asyncsgl", tracer_provider=tracer_provider)

    def listen(self, program: str, run_id: str) -> Listener:
        """The listener that makes the spans of one run."""
        return _RunSpans(self._tracer, program, run_id)


class _RunSpans:
    """The spans of one run. A branch makes one generation at a time."""

    def __init__(self, tracer: Tracer, program: str, run_id: str) -> None:
        self._tracer = tracer
        attributes = {"asyncsgl.program": program, "asyncsgl.run.id": run_id}
        self._span = tracer.start_span(f"run {program}", attributes=attributes)
        self._context: Context = set_span_in_context(self._span)
        self._open: dict[Path, Span] = {}
        self._silent: set[Path] = set()

    def on(self, event: Event) -> None:
        """Begin, mark or end a span."""
        match event:
            case VariableStarted(branch=branch):
                self._open[branch] = self._begin(event)
                self._silent.add(branch)
            case Text(branch=branch, name=name) if name is not None and branch in self._silent:
                self._silent.discard(branch)
                self._open[branch].add_event("gen_ai.first_token")
            case VariableFinished(branch=branch, meta=meta) if branch in self._open:
                self._silent.discard(branch)
                _answered(self._open.pop(branch), meta)
            case VariableFailed(branch=branch, error=error) if branch in self._open:
                self._silent.discard(branch)
                _failed(self._open.pop(branch), error)
            case RunFinished(error=error):
                for span in self._open.values():
                    span.end()
                if error is None:
                    self._span.end()
                else:
                    _failed(self._span, error)
            case _:
                pass

    def _begin(self, event: VariableStarted) -> Span:
        operation = "chat" if any(m.role for m in event.request.messages) else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {event.name or 'text'}", context=self._context, kind=SpanKind.CLIENT
        )
        span.set_attribute("gen_ai.operation.name", operation)
        span.set_attribute("gen_ai.provider.name", event.backend)
        span.set_attribute("asyncsgl.branch", list(event.branch))
        if event.name is not None:
            span.set_attribute("asyncsgl.variable", event.name)
        _asked(span, event.request)
        return span


def _asked(span: Span, request: GenRequest) -> None:
    for field, attribute in _REQUEST_ATTRIBUTES.items():
        value = getattr(request.sampling, field)
        if value is not None:
            span.set_attribute(attribute, list(value) if isinstance(value, tuple) else value)


def _answered(span: Span, metas: Meta | list[Meta]) -> None:
    all_metas = metas if isinstance(metas, list) else [metas]
    first = all_metas[0]
    if first.model:
        span.set_attribute("gen_ai.response.model", first.model)
    span.set_attribute("gen_ai.response.id", first.request_id)
    reasons = [meta.finish_reason for meta in all_metas if meta.finish_reason is not None]
    span.set_attribute("gen_ai.response.finish_reasons", reasons)
    span.set_attribute("gen_ai.usage.input_tokens", first.prompt_tokens)
    output = sum(meta.completion_tokens for meta in all_metas)
    span.set_attribute("gen_ai.usage.output_tokens", output)
    span.end()


def _failed(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR, str(error)))
    span.end()
