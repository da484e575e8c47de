"""Finished spans of this process, kept in memory for `shoal trace`: a bounded number, the latest ones.

    call with a sampled traceparent ──> span ──its end──> KeptSpans ──GET /spans of the metrics' address──> shoal trace

A process without a collector makes spans for calls of sampled traces only, and for so many a second at most. All
others pay for one look-up of a header.

A call of no sampled trace that has failed or was slow leaves a span, too (tail sampling, mesh.rpc.tail_spans). These
spans have memory of their own, where each tenant has a rate, and the tenant with the most spans loses its oldest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
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
TAIL_KEPT = 2_000
"""Spans of calls that were not sampled and have failed or were slow: about 2 MiB."""
TAIL_OF_TENANT = 200
"""Of them, those of one tenant."""
TAIL_A_SECOND = 100
"""Spans of such calls that are made in a second: a span costs 10 us."""
TAIL_OF_TENANT_A_SECOND = 5
"""Of them, those of one tenant: a flood of its failed calls leaves the other 95 to the others, and shows 40 s of it."""
JOB = "shoal.job"
"""Attribute with the id of the job that a span belongs to."""
TENANT = "shoal.tenant"
"""Attribute with the tenant of a call: its users may see the span."""
_TEXT_CHARS = 300
_ATTRIBUTES = 16


class TailSpans:
    """Spans of calls that have failed or were slow, by tenant. Only the event loop's thread adds to them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_tenant: dict[str, deque[dict[str, Any]]] = {}
        self._count = 0
        self._since = -1.0
        self._admitted: dict[str, int] = {}
        self._admitted_count = 0

    def admits(self, tenant: str) -> bool:
        """Return True when a span may be made for one more call of a tenant; it is counted."""
        now = self._clock()
        if now - self._since >= 1:
            self._since, self._admitted_count = now, 0
            self._admitted.clear()
        of_tenant = self._admitted.get(tenant, 0)
        if of_tenant >= TAIL_OF_TENANT_A_SECOND or self._admitted_count >= TAIL_A_SECOND:
            return False
        self._admitted[tenant] = of_tenant + 1
        self._admitted_count += 1
        return True

    def add(self, tenant: str, span: dict[str, Any]) -> None:
        """Keep a span; beyond a bound, drop the oldest of its tenant, or of the tenant with the most."""
        spans = self._by_tenant.setdefault(tenant, deque())
        spans.append(span)
        self._count += 1
        if len(spans) > TAIL_OF_TENANT:
            self._drop_oldest(tenant)
        elif self._count > TAIL_KEPT:
            self._drop_oldest(max(self._by_tenant, key=lambda each: len(self._by_tenant[each])))

    def _drop_oldest(self, tenant: str) -> None:
        spans = self._by_tenant[tenant]
        spans.popleft()
        self._count -= 1
        if not spans:
            del self._by_tenant[tenant]

    def all(self) -> list[dict[str, Any]]:
        """Return the spans of all tenants."""
        return [span for spans in self._by_tenant.values() for span in spans]


class KeptSpans(SpanProcessor):
    """The latest finished spans, as plain values. Spans may end on any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, instance: str = "") -> None:
        """`instance` is the one of spans that are added as values (`tail`)."""
        self._clock = clock
        self._instance = instance
        self.has_all_roots = False
        """True: each call without a trace begins a sampled one."""
        self.tail = TailSpans(clock)
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
        self._spans.append(
            _span(
                trace=f"{context.trace_id:032x}",
                span=f"{context.span_id:016x}",
                parent=f"{span.parent.span_id:016x}" if span.parent is not None else "",
                instance=str(span.resource.attributes.get("service.instance.id", "")),
                name=span.name,
                start_ns=span.start_time,
                end_ns=span.end_time,
                error=(span.status.description or span.status.status_code.name)
                if not span.status.is_ok and not span.status.is_unset
                else "",
                attributes=span.attributes or {},
                # Traces of other calls that this span also did the work of.
                links=[f"{link.context.trace_id:032x}" for link in span.links[:_ATTRIBUTES]],
            )
        )

    def add_tail(
        self,
        name: str,
        *,
        trace_id: str,
        span_id: str,
        parent: str,
        seconds: float,
        tenant: str,
        error: str,
        attributes: Mapping[str, Any],
    ) -> None:
        """Keep the span of a call that ends now after `seconds`; `tail.admits` has admitted it. Ids are hexadecimal."""
        end_ns = time.time_ns()
        span = _span(
            trace=trace_id,
            span=span_id,
            parent=parent,
            instance=self._instance,
            name=name,
            start_ns=end_ns - int(seconds * 1e9),
            end_ns=end_ns,
            error=error,
            attributes={**attributes, TENANT: tenant} if tenant else attributes,
            links=[],
        )
        self.tail.add(tenant, span)

    def of_trace(self, trace_id: str) -> list[dict[str, Any]]:
        """Return the kept spans of a trace, by the first characters of its id, also those that refer to it."""
        return [
            span
            for span in self._all()
            if span["trace"].startswith(trace_id) or any(link.startswith(trace_id) for link in span["links"])
        ]

    def latest(self, count: int) -> list[dict[str, Any]]:
        """Return the latest spans of calls that failed or were slow, the last to end first."""
        return sorted(self.tail.all(), key=lambda span: span["end_ns"], reverse=True)[:count]

    def of_job(self, job_id: str) -> list[dict[str, Any]]:
        """Return the kept spans of attempts of a job."""
        return [span for span in self._all() if span["attributes"].get(JOB) == job_id]

    def _all(self) -> list[dict[str, Any]]:
        return [*tuple(self._spans), *self.tail.all()]


def _span(*, name: str, error: str, attributes: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a span as values, with bounded texts that UTF-8 can hold: an error may quote half a surrogate pair."""

    def bounded(text: str) -> str:
        return text[:_TEXT_CHARS].encode(errors="replace").decode()

    return {
        **more,
        "name": bounded(name),
        "error": bounded(error),
        "attributes": {
            key: bounded(value) if isinstance(value, str) else value
            for key, value in list(attributes.items())[:_ATTRIBUTES]
            if isinstance(value, str | int | float)
        },
    }


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
