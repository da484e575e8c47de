"""Metrics over OTLP, taken by a real gRPC server with OpenTelemetry's messages."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc

from mesh.metrics import otlp
from mesh.metrics.families import Family, Kind, Reading
from mesh.metrics.histogram import Exemplars, Histogram
from mesh.process.telemetry import collector, resource_of

TIMES = Family("shoal.test.duration", Kind.HISTOGRAM, "s", "Times.", ("model",))
CALLS = Family("shoal.test.calls", Kind.COUNTER, "{call}", "Calls.", ("model",))
NOW = Family("shoal.test.now", Kind.GAUGE, "By", "Bytes.")
NV = Family("nv_inference_count", Kind.COUNTER, "", "As in Triton.", ("model",), verbatim=True)


class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self) -> None:
        self.requests: list[pb.ExportMetricsServiceRequest] = []
        self.headers: dict[str, str] = {}

    async def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.headers = dict(context.invocation_metadata())
        return pb.ExportMetricsServiceResponse()


@pytest.fixture
async def received(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    server, found = grpc.aio.server(), Collector()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://ann:s%40cret@127.0.0.1:{port}")
    yield found
    await server.stop(None)


def readings() -> list[Reading]:
    times = Histogram((0.1, 1.0))
    times.add(0.5, 3)
    exemplars = Exemplars((0.1, 1.0))
    exemplars.add(0.5, 0xABC, 0xDEF, 1_700_000_000.5)
    return [(TIMES, ("m",), times.read(exemplars.read())), (CALLS, ("m",), 7), (NOW, (), 2.5), (NV, ("m",), 1)]


async def test_the_readings_arrive_as_points_at_the_end_of_the_process(received: Collector) -> None:
    async with otlp.exported([readings], resource_of("test", "local/test-0")):
        pass
    (request,) = received.requests
    assert received.headers["authorization"] == "Basic " + base64.b64encode(b"ann:s@cret").decode()
    (of_resource,) = request.resource_metrics
    attributes = {each.key: each.value.string_value for each in of_resource.resource.attributes}
    assert attributes["service.name"] == "shoal-test"
    assert attributes["service.instance.id"] == "local/test-0"
    found = {metric.name: metric for metric in of_resource.scope_metrics[0].metrics}
    assert [*found] == ["shoal.test.duration", "shoal.test.calls", "shoal.test.now"]
    (times,) = found["shoal.test.duration"].histogram.data_points
    assert (list(times.bucket_counts), list(times.explicit_bounds)) == ([0, 3, 0], [0.1, 1.0])
    assert (times.count, times.sum) == (3, 1.5)
    [exemplar] = times.exemplars
    assert (exemplar.as_double, exemplar.time_unix_nano) == (0.5, 1_700_000_000_500_000_000)
    assert (exemplar.trace_id.hex(), exemplar.span_id.hex()) == (f"{0xABC:032x}", f"{0xDEF:016x}")
    calls = found["shoal.test.calls"].sum
    assert calls.is_monotonic
    assert calls.data_points[0].as_int == 7
    assert calls.data_points[0].attributes[0].value.string_value == "m"
    assert found["shoal.test.now"].gauge.data_points[0].as_double == 2.5
    assert found["shoal.test.now"].unit == "By"


async def test_they_are_sent_again_and_again(received: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "interval_s", lambda environ: 0.01)
    async with otlp.exported([readings], resource_of("test", "local/test-0")), asyncio.timeout(30):
        while len(received.requests) < 3:
            await asyncio.sleep(0.01)


async def test_a_source_that_fails_ends_nothing(received: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "interval_s", lambda environ: 0.01)
    calls = 0

    def source() -> list[Reading]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("once")
        return readings()

    async with otlp.exported([source], resource_of("test", "local/test-0")), asyncio.timeout(30):
        while not received.requests:
            await asyncio.sleep(0.01)


def test_the_variables_are_those_of_opentelemetry() -> None:
    on = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4317"}
    assert collector(on, "METRICS") == "http://c:4317"
    assert collector(on) is None
    assert collector({**on, "OTEL_METRICS_EXPORTER": "none"}, "METRICS") is None
    assert otlp.interval_s({}) == 60
    assert otlp.interval_s({"OTEL_METRIC_EXPORT_INTERVAL": "5"}) == 1
    assert otlp.interval_s({"OTEL_METRIC_EXPORT_INTERVAL": "soon"}) == 60
