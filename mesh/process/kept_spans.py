"""Finished spans of this process, kept in memory for `shoal trace`: a bounded number, the latest ones.

    call with a sampled traceparent ──> span ──its end──> KeptSpans ──GET /spans of the metrics' address──> shoal trace

A process without a collector makes spans for calls of sampled traces only, and for so many a second at most. All
others pay for one look-up of a header.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Span

KEPT = 2_000
"""Spans of a process: about 2 MiB."""
ADMITTED_A_SECOND = 50
"""Sampled calls of a second for which a process without a collector makes spans: enough for whoever looks for one."""
_TEXT_CHARS = 300
_ATTRIBUTES = 16


class KeptSpans(SpanProcessor):
    """The latest finished spans, as plain values. Spans may end on any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spans: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._since = -1.0
        self._admitted = 0

    def admits(self) -> bool:
        """Return True when a span may be made for one more sampled call; it is counted."""
        now = self._clock()
        if now - self._since >= 1:
            self._since, self._admitted = now, 0
        self._admitted += 1
        return self._admitted <= ADMITTED_A_SECOND

    def on_end(self, span: ReadableSpan) -> None:
        """Keep a finished span."""
        context = span.context
        if context is None or span.start_time is None or span.end_time is None:
            return
        attributes = list((span.attributes or {}).items())[:_ATTRIBUTES]
        self._spans.append(
            {
                "trace": f"{context.trace_id:032x}",
                "span": f"{context.span_id:016x}",
                "parent": f"{span.parent.span_id:016x}" if span.parent is not None else "",
                "instance": str(span.resource.attributes.get("service.instance.id", "")),
                "name": span.name[:_TEXT_CHARS],
                "start_ns": span.start_time,
                "end_ns": span.end_time,
                "error": (span.status.description or span.status.status_code.name)[:_TEXT_CHARS]
                if not span.status.is_ok and not span.status.is_unset
                else "",
                "attributes": {
                    name: value[:_TEXT_CHARS] if isinstance(value, str) else value
                    for name, value in attributes
                    if isinstance(value, str | int | float)
                },
                # Traces of other calls that this span also did the work of.
                "links": [f"{link.context.trace_id:032x}" for link in span.links[:_ATTRIBUTES]],
            }
        )

    def of_trace(self, trace_id: str) -> list[dict[str, Any]]:
        """Return the kept spans of a trace, by the first characters of its id, also those that refer to it."""
        return [
            span
            for span in tuple(self._spans)
            if span["trace"].startswith(trace_id) or any(link.startswith(trace_id) for link in span["links"])
        ]

    def of_job(self, job_id: str) -> list[dict[str, Any]]:
        """Return the kept spans of attempts of a job."""
        return [span for span in tuple(self._spans) if span["attributes"].get("shoal.job") == job_id]


_NONE = trace.NoOpTracer()


class OnRequest(trace.TracerProvider):
    """Tracer provider of a process without a collector: spans of sampled callers only, into `kept`."""

    def __init__(self, resource: Resource, kept: KeptSpans) -> None:
        self.kept = kept
        self.resource = resource
        self._sdk = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._sdk.add_span_processor(kept)

    def get_tracer(self, instrumenting_module_name: str, *args: Any, **kwargs: Any) -> trace.Tracer:
        return _OnRequestTracer(self._sdk.get_tracer(instrumenting_module_name, *args, **kwargs), self.kept)


class _OnRequestTracer(trace.Tracer):
    def __init__(self, sdk: trace.Tracer, kept: KeptSpans) -> None:
        self._sdk = sdk
        self._kept = kept

    def start_span(self, name: str, context: Context | None = None, *args: Any, **kwargs: Any) -> Span:
        parent = trace.get_current_span(context).get_span_context()
        is_kept = parent.is_valid and parent.trace_flags.sampled and (not parent.is_remote or self._kept.admits())
        return (self._sdk if is_kept else _NONE).start_span(name, context, *args, **kwargs)

    # The SDK's method calls `start_span`.
    start_as_current_span = SdkTracer.start_as_current_span
