"""Spans that a process keeps: which ones, how many, and what no collector costs."""

from __future__ import annotations

import json

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from mesh.metrics.endpoint import Request
from mesh.metrics.spans import SpansPage
from mesh.process.kept_spans import ADMITTED_A_SECOND, KEPT, KeptSpans, OnRequest
from mesh.process.telemetry import Sampling
from mesh.rpc.fast_spans import FastTracer
from mesh.rpc.span_listing import message_of

TRACE = 0x4BF92F3577B34DA6A3CE929D0E0E4736
SAMPLED = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = SAMPLED[:-1] + b"0"


def of(flags: int) -> trace.Context:
    caller = SpanContext(TRACE, 7, True, TraceFlags(flags))
    return trace.set_span_in_context(NonRecordingSpan(caller))


def fast(kept: KeptSpans) -> FastTracer:
    return FastTracer(
        kept.on_end, Resource({"service.instance.id": "n/infer-0"}), Sampling(0.0, True), admits=kept.admits
    )


def test_only_sampled_callers_get_spans() -> None:
    kept = KeptSpans()
    tracer, quick = OnRequest(Resource({}), kept).get_tracer("shoal"), fast(kept)
    assert tracer.start_span("none").get_span_context() == trace.INVALID_SPAN_CONTEXT
    unsampled = tracer.start_span("unsampled", of(0))
    assert (unsampled.is_recording(), unsampled.get_span_context().span_id) == (False, 7)
    assert quick.begin({}) is None
    assert quick.begin({b"traceparent": UNSAMPLED}) is None
    with trace.use_span(tracer.start_span("outer", of(1)), end_on_exit=True):
        with tracer.start_as_current_span("inner"):
            pass
    span = quick.begin({b"traceparent": SAMPLED})
    assert span is not None
    quick.end(span, "/a.B/C", 13, "broken")
    found = kept.of_trace("4bf92f35")
    assert [each["name"] for each in found] == ["inner", "outer", "a.B/C"]
    assert found[0]["parent"] == found[1]["span"]
    assert (found[2]["error"], found[2]["instance"]) == ("broken", "n/infer-0")
    assert kept.of_trace("ffffffff") == []


def test_the_number_of_spans_and_their_size_are_bounded() -> None:
    now = 0.0
    kept = KeptSpans(lambda: now)
    quick = fast(kept)
    spans = [quick.begin({b"traceparent": SAMPLED}) for _ in range(2 * ADMITTED_A_SECOND)]
    assert sum(span is not None for span in spans) == ADMITTED_A_SECOND
    now = 1.0
    span = quick.begin({b"traceparent": SAMPLED})
    assert span is not None
    for n in range(KEPT + 5):
        quick.end(span, f"/a.B/{n}", 13, "x" * 100_000)
    found = kept.of_trace("4bf92f35")
    assert (len(found), found[-1]["name"]) == (KEPT, f"a.B/{KEPT + 4}")
    assert len(json.dumps(found)) < KEPT * 1_000


def test_an_error_that_quotes_half_a_surrogate_pair_does_not_hide_the_spans_of_its_process() -> None:
    kept = KeptSpans()
    about = {"shoal.model": "a\udcff"}
    kept.add_tail("a", trace_id="1", span_id="1", parent="", seconds=1, tenant="", error="no \ud800", attributes=about)
    [span] = map(message_of, kept.latest(1))
    assert (span.error, span.attributes) == ("no ?", {"shoal.model": "a?"})


async def test_the_page_takes_a_trace_or_a_job_and_nothing_else() -> None:
    kept = KeptSpans()
    tracer = OnRequest(Resource({}), kept).get_tracer("shoal")
    tracer.start_span("attempt", of(1), attributes={"shoal.job": "01JD8"}).end()
    page = SpansPage(kept)
    for query in ("trace=4bf92f35", "job=01JD8"):
        response = await page(Request("/spans", query, {}))
        assert [span["name"] for span in json.loads(response.body)] == ["attempt"]
    kept.tail.add("", {"end_ns": 1, "trace": "0" * 32, "links": [], "attributes": {}, "name": "failed"})
    response = await page(Request("/spans", "", {}))
    assert [span["name"] for span in json.loads(response.body)] == ["failed"]
    for query in ("trace=", "trace=4BF92F35", "trace=4bf92f3", "job=a%0ab", "trace=4bf92f35&job=1", "x=4bf92f35"):
        assert (await page(Request("/spans", query, {}))).status == 400
