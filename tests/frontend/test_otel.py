"""Runs as OpenTelemetry spans, read back from the SDK's in-memory exporter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import asyncsgl as sgl
from asyncsgl.otel import OpenTelemetryInstrument
from asyncsgl.telemetry import instrumented
from asyncsgl.testing import ScriptedBackend

pytestmark = pytest.mark.anyio


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with instrumented(OpenTelemetryInstrument(provider)):
        yield exporter
    provider.shutdown()


@sgl.function
async def ask(s: sgl.ProgramState) -> None:
    s += sgl.user("Secret question")
    s += sgl.assistant(sgl.gen("answer", max_tokens=5, temperature=0.5, stop=["\n"]))


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    [span] = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


async def test_a_run_is_a_span_with_one_for_each_generation(
    exporter: InMemorySpanExporter,
) -> None:
    await ask.run(backend=ScriptedBackend("the answer"))
    run, generation = named(exporter, "run ask"), named(exporter, "chat answer")
    assert generation.parent is not None
    assert run.context is not None
    assert generation.parent.span_id == run.context.span_id
    attributes = dict(generation.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.provider.name"] == "scripted"
    assert attributes["gen_ai.request.max_tokens"] == 5
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.request.stop_sequences"] == ("\n",)
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["gen_ai.usage.input_tokens"] == 2
    assert attributes["gen_ai.usage.output_tokens"] == 2
    assert "Secret" not in str(attributes)


async def test_streams_mark_the_first_token_once(exporter: InMemorySpanExporter) -> None:
    async with ask.stream(backend=ScriptedBackend("the answer", chunk_size=1)) as run:
        await run.result()
    events = [event.name for event in named(exporter, "chat answer").events]
    assert events == ["gen_ai.first_token"]


async def test_failures_are_errors(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(sgl.OverloadedError):
        await ask.run(backend=ScriptedBackend([sgl.OverloadedError("busy")]))
    for name in ("run ask", "chat answer"):
        span = named(exporter, name)
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "OverloadedError"


async def test_branches_have_spans_of_their_own(exporter: InMemorySpanExporter) -> None:
    @sgl.function
    async def spread(s: sgl.ProgramState) -> None:
        async with s.fork(3) as branches:
            branches += sgl.gen("x")

    await spread.run(backend=ScriptedBackend("y"))
    spans = [span for span in exporter.get_finished_spans() if span.name.startswith("text_")]
    assert sorted((span.attributes or {})["asyncsgl.branch"] for span in spans) == [  # type: ignore[type-var]
        (0,),
        (1,),
        (2,),
    ]
