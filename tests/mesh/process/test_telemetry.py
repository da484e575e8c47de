"""Tracing ends with its process, also when the collector does not accept the last spans, and logs no password."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_EXPORTS = """
import asyncio, os, threading
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from mesh.metrics import otlp
from mesh.process import telemetry

# Spans are exported at the stop only.
os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "1000000"
COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
never, spans_sent = threading.Event(), threading.Event()
names = []

class Spans(SpanExporter):
    def export(self, spans):
        names.extend(span.name for span in spans)
        return self.take()
    def take(self):
        return SpanExportResult.SUCCESS

class Metrics:
    results = []
    def export(self, data):
        self.results.append(self.take())
        return self.results[-1]
    def take(self):
        return MetricExportResult.SUCCESS
    def shutdown(self):
        pass

telemetry._exporter, otlp._exporter = lambda environ: Spans(), lambda environ: Metrics()

def span(name):
    trace.get_tracer("test").start_span(name).end()

async def nothing():
    pass

async def process(before_the_stop=nothing, at_the_end=lambda: None):
    with telemetry.tracing("test", "test-0", COLLECTOR):
        async with otlp.exported([], telemetry.resource_of("test", "test-0"), COLLECTOR):
            span("first")
            await before_the_stop()
        span("last")
    at_the_end()
    # As a service does: its threads are left.
    os._exit(0)
"""

_AWAY = """
Spans.take = Metrics.take = lambda self: never.wait()
telemetry.LAST_EXPORT_S = telemetry.AWAY_S = 0.1
asyncio.run(process())
"""

_AT_ONCE = """
def take_metrics(self):
    return MetricExportResult.SUCCESS if spans_sent.wait(30) else MetricExportResult.FAILURE

def take_spans(self):
    spans_sent.set()
    return SpanExportResult.SUCCESS

def check():
    assert Metrics.results == [MetricExportResult.SUCCESS], "the spans waited for the metrics"
    assert names == ["first", "last"], names

Metrics.take, Spans.take = take_metrics, take_spans
telemetry.LAST_EXPORT_S = 60
asyncio.run(process(at_the_end=check))
"""

_AWAY_BEFORE = """
failed = set()
tries_again = {Spans: threading.Event(), Metrics: threading.Event()}

def fail_once(self):
    if type(self) in failed:
        tries_again[type(self)].set()
        never.wait()
    failed.add(type(self))

# Only an exporter that tries again is known to have seen its failure.
async def both_have_failed():
    while not all(event.is_set() for event in tries_again.values()):
        span("another")
        await asyncio.sleep(0.01)

Spans.take = Metrics.take = fail_once
telemetry.LAST_EXPORT_S, telemetry.AWAY_S = 1000, 0.1
otlp.interval_s = lambda environ: 0.01
os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "10"
asyncio.run(process(both_have_failed))
"""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(_AWAY, id="collectors that never answer hold up no stop"),
        pytest.param(_AT_ONCE, id="spans and metrics are exported at once, and the last ones arrive"),
        pytest.param(_AWAY_BEFORE, id="less is waited for collectors that were away before"),
    ],
)
def test_the_last_export_of_a_process(case: str) -> None:
    done = subprocess.run([sys.executable, "-c", _EXPORTS + case], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


_UNRESOLVED = """
import asyncio, logging
from opentelemetry import trace
from mesh.metrics import otlp
from mesh.process import telemetry

logging.basicConfig(level=logging.DEBUG)

async def exported():
    async with otlp.exported([], telemetry.resource_of("test", "test-0")):
        pass

with telemetry.tracing("test", "test-0"):
    trace.get_tracer("test").start_span("last").end()
asyncio.run(exported())
"""


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_password_in_the_address_of_a_collector_that_is_not_found_is_in_no_log(protocol: str) -> None:
    collector = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://ann:s%40cret@collector.invalid:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _UNRESOLVED],
        env={**os.environ, **collector},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "collector.invalid" in done.stderr
    for secret in ("s@cret", "s%40cret", "cret@", "YW5uOnNAY3JldA"):
        assert secret not in done.stderr
