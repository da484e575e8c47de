"""Export of a process's metrics over OTLP, as finished points: no meter of the SDK counts anything.

OTEL_EXPORTER_OTLP_ENDPOINT (or ..._METRICS_ENDPOINT) turns the export on, OTEL_METRICS_EXPORTER=none off;
OTEL_METRIC_EXPORT_INTERVAL is its interval in milliseconds. The SDK's exporter reads the variables for TLS.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from mesh.metrics.families import LABEL_CHARS, Family, Kind, Reading, Source, Value
from mesh.metrics.histogram import Buckets
from mesh.metrics.snapshot import snapshot
from mesh.process import telemetry
from mesh.process.tasks import end
from shoal import __version__

log = logging.getLogger(__name__)

# OpenTelemetry's default; a shorter interval than a second costs more than it shows.
_DEFAULT_MS, _LEAST_MS = 60_000, 1_000

# Points of one message: 500 models have 60,000, and collectors take messages of 4 MiB.
_MAX_POINTS = 5_000


def interval_s(environ: Mapping[str, str]) -> float:
    """Return the interval of exports; the default replaces a missing or invalid value."""
    value = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")
    return max(int(value), _LEAST_MS) / 1000 if value.isdecimal() and len(value) < 12 else _DEFAULT_MS / 1000


def points(readings: Iterable[Reading], resource: Resource, started_ns: int, now_ns: int) -> MetricsData:
    """Return readings as the SDK's exporters take them, cumulative since `started_ns`."""
    found: dict[Family, list[Any]] = {}
    for family, values, value in readings:
        if not family.verbatim:
            attributes = {key: text[:LABEL_CHARS] for key, text in zip(family.labels, values, strict=True)}
            found.setdefault(family, []).append(_point(attributes, value, started_ns, now_ns))
    metrics = [Metric(family.name, family.help, family.unit, _data(family, each)) for family, each in found.items()]
    scope = ScopeMetrics(InstrumentationScope("shoal", __version__), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _data(family: Family, found: list[Any]) -> Any:
    match family.kind:
        case Kind.COUNTER:
            return Sum(found, AggregationTemporality.CUMULATIVE, is_monotonic=True)
        case Kind.GAUGE:
            return Gauge(found)
        case Kind.HISTOGRAM:
            return Histogram(found, AggregationTemporality.CUMULATIVE)


def _point(attributes: Mapping[str, str], value: Value, started_ns: int, now_ns: int) -> Any:
    if not isinstance(value, Buckets):
        return NumberDataPoint(attributes, started_ns, now_ns, value)
    # The smallest and the largest value are not known: the encoder leaves out what is None.
    least: Any = None
    total = sum(value.counts)
    exemplars = [
        Exemplar({}, float(each.value), int(each.at_s * 1e9), each.span_id, each.trace_id)
        for each in value.exemplars
        if each is not None
    ]
    return HistogramDataPoint(
        attributes, started_ns, now_ns, total, value.sum, value.counts, value.bounds, least, least, exemplars
    )


def _exporter(environ: Mapping[str, str]) -> MetricExporter:
    endpoint, headers = telemetry.collector(environ, "METRICS"), telemetry.collector_headers(environ, "METRICS")
    if telemetry.protocol(environ, "METRICS") == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

        return HttpExporter(endpoint, headers=headers, max_export_batch_size=_MAX_POINTS)
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

    return GrpcExporter(endpoint, headers=headers, max_export_batch_size=_MAX_POINTS)


@asynccontextmanager
async def exported(
    sources: Sequence[Source], resource: Resource, environ: Mapping[str, str] = os.environ
) -> AsyncIterator[None]:
    """Export the metrics until the block ends, and once more then. The environment names a collector."""
    exporter, started_ns = _exporter(environ), time.time_ns()
    is_taken = True

    async def export() -> None:
        nonlocal is_taken
        readings = await snapshot(sources)
        taken = await asyncio.to_thread(lambda: exporter.export(points(readings, resource, started_ns, time.time_ns())))
        is_taken = taken is MetricExportResult.SUCCESS

    task = asyncio.create_task(_repeated(export, interval_s(environ)))
    try:
        yield
    finally:
        telemetry.begin_last_export()
        await end(task)
        last = asyncio.create_task(_logged(export))
        # The exporter by itself tries again for a minute. Over HTTP its thread cannot be interrupted, and is left.
        await asyncio.wait([last], timeout=telemetry.last_export_s(is_taken))
        exporter.shutdown()
        await end(last)


async def _repeated(export: Any, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await _logged(export)


async def _logged(export: Any) -> None:
    try:
        await export()
    # An exporter must not end its service.
    except Exception:
        log.exception("the metrics were not exported", {"event": "metrics.export_failed"})
