"""OpenTelemetry: traces are exported when the standard OTEL_* variables say so, and cost next to nothing otherwise.

OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) turns the exporter on; OTEL_EXPORTER_OTLP_PROTOCOL picks `grpc`
(default) or `http/protobuf`; OTEL_TRACES_EXPORTER=none and OTEL_SDK_DISABLED=true turn it off; sampling, batching and
headers are read by the SDK itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from shoal import __version__

_LAST_SPANS_S = 2.0
# How long a stop waits for the collector to take the last spans.


def collector(environ: Mapping[str, str]) -> str | None:
    """The OTLP endpoint for traces, or None when the environment asks for none."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    return environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None


def _exporter(environ: Mapping[str, str]) -> SpanExporter:
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter()


@contextmanager
def tracing(service: str, instance: str, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Exports this process's spans as service `shoal-<service>` until the block ends, then flushes them."""
    if collector(environ) is None:
        yield
        return
    resource = Resource.create(
        {"service.name": f"shoal-{service}", "service.instance.id": instance, "service.version": __version__}
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = _exporter(environ)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # Of its own accord the processor would wait half a minute for a collector that is away, and a stop with it.
        late = threading.Timer(_LAST_SPANS_S, exporter.shutdown)
        late.start()
        provider.shutdown()
        late.cancel()
