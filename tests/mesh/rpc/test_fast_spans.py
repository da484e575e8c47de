"""Spans of the fast path: sampled as the SDK samples, and exported like the spans of the slow path."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider, sampling
from opentelemetry.trace import SpanKind, StatusCode

from mesh.process.telemetry import Sampling, sampling_of
from mesh.rpc.fast_spans import FastTracer, parent_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PATH = "/inference.GRPCInferenceService/ModelInfer"


def header(flags: str = "01", trace_id: str = TRACE, span_id: str = SPAN, version: str = "00") -> dict[bytes, bytes]:
    return {b"traceparent": f"{version}-{trace_id}-{span_id}-{flags}".encode()}


def tracer(ratio: float, *, follows_parent: bool = True, exported: list[ReadableSpan] | None = None) -> FastTracer:
    spans: list[ReadableSpan] = [] if exported is None else exported
    return FastTracer(spans.append, Resource.create({"service.name": "test"}), Sampling(ratio, follows_parent), seed=7)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 1.0])
def test_the_configured_share_of_calls_without_a_trace_is_sampled(ratio: float) -> None:
    tracing = tracer(ratio)
    sampled = sum(tracing.begin({}) is not None for _ in range(20_000))
    # Five standard deviations of a binomial distribution.
    assert abs(sampled - 20_000 * ratio) <= 5 * (20_000 * ratio * (1 - ratio)) ** 0.5


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_a_root_span_is_one_that_the_sdk_would_sample(ratio: float) -> None:
    tracing, sdk = tracer(ratio), sampling.TraceIdRatioBased(ratio)
    for span in filter(None, (tracing.begin({}) for _ in range(2_000))):
        assert sdk.should_sample(None, span.context.trace_id, "x").decision.is_sampled()
        assert span.parent is None
        assert span.context.is_valid


@pytest.mark.parametrize("flags", ["00", "01", "02", "03", "0a", "0b", "fe", "ff"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_call_of_a_trace_is_sampled_as_its_caller_is(flags: str, ratio: float) -> None:
    span = tracer(ratio).begin(header(flags))
    assert (span is not None) == bool(int(flags, 16) & 1)
    if span is not None:
        assert span.parent is not None
        assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
        assert span.context.trace_id == span.parent.trace_id
        assert span.context.span_id != span.parent.span_id


@pytest.mark.parametrize("low", ["0000000000000000", "3fffffffffffffff", "4000000000000000", "ffffffffffffffff"])
@pytest.mark.parametrize("flags", ["00", "01"])
def test_a_sampler_that_ignores_the_parent_decides_by_the_trace_id(low: str, flags: str) -> None:
    trace_id = "a" * 16 + low
    sdk = sampling.TraceIdRatioBased(0.25).should_sample(None, int(trace_id, 16), "x").decision.is_sampled()
    assert (tracer(0.25, follows_parent=False).begin(header(flags, trace_id)) is not None) == sdk


INVALID = [
    header(trace_id="0" * 32),
    header(span_id="0" * 16),
    header(trace_id=TRACE.upper()),
    header(version="ff"),
    {b"traceparent": header()[b"traceparent"] + b"-more"},
    {b"traceparent": b"x" * 54 + b"1"},
    {b"traceparent": b"\xff" * 60},
    {b"traceparent": b""},
    {b"traceparent": b"00-1-1-01"},
]


@pytest.mark.parametrize("headers", INVALID)
def test_an_invalid_header_begins_a_new_trace_as_in_the_sdk(headers: dict[bytes, bytes]) -> None:
    carrier = {"traceparent": headers[b"traceparent"].decode("latin-1")}
    assert not trace.get_current_span(propagate.extract(carrier)).get_span_context().is_valid
    span = tracer(1.0).begin(headers)
    assert span is not None
    assert span.parent is None
    assert parent_of(headers) == ""


def test_the_caller_s_trace_state_is_carried_on() -> None:
    span = tracer(1.0).begin({**header(), b"tracestate": b"a=1,b=2"})
    assert span is not None
    assert dict(span.context.trace_state) == {"a": "1", "b": "2"}


def exported(headers: dict[bytes, bytes], code: int, message: str) -> ReadableSpan:
    spans: list[ReadableSpan] = []
    tracing = tracer(1.0, exported=spans)
    begun = tracing.begin(headers)
    assert begun is not None
    tracing.end(begun, PATH, code, message)
    (span,) = spans
    return span


@pytest.mark.parametrize(("code", "status"), [(0, "UNSET"), (3, "UNSET"), (1, "UNSET"), (13, "ERROR"), (15, "ERROR")])
def test_a_finished_span_has_the_outcome_of_the_call(code: int, status: str) -> None:
    span = exported(header(), code, "why")
    assert span.name == PATH[1:]
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode[status]
    assert span.attributes is not None
    assert span.attributes.get("rpc.grpc.status_code", 0) == code
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= span.end_time


def test_the_exporter_encodes_it_as_a_span_of_the_sdk() -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "test"}))
    theirs: Any = provider.get_tracer("shoal").start_span(
        PATH[1:], propagate.extract({"traceparent": header()[b"traceparent"].decode()}), SpanKind.SERVER
    )
    theirs.end()
    found = []
    for span in (exported(header(), 0, ""), theirs):
        (resource,) = encode_spans([span]).resource_spans
        (scope,) = resource.scope_spans
        (encoded,) = scope.spans
        found.append((resource.resource, scope.scope, encoded.name, encoded.kind, encoded.trace_id, encoded.flags))
        assert encoded.parent_span_id.hex() == SPAN
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, Sampling(1.0, True)),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, Sampling(0.0, False)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, Sampling(0.0, True)),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}, Sampling(0.01, False)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}, Sampling(0.5, True)),
        ({"OTEL_TRACES_SAMPLER": "PARENTBASED_TRACEIDRATIO", "OTEL_TRACES_SAMPLER_ARG": "1e-3"}, Sampling(1e-3, True)),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "often"}, Sampling(1.0, False)),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "7"}, Sampling(1.0, False)),
        ({"OTEL_TRACES_SAMPLER": "unheard_of"}, Sampling(1.0, True)),
    ],
)
def test_the_sampler_is_the_one_that_the_environment_names(environ: dict[str, str], wanted: Sampling) -> None:
    assert sampling_of(environ) == wanted
