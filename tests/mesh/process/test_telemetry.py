"""Tracing ends with its process, also when the collector does not accept the last spans, and logs no password."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_GONE = """
import threading
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from mesh.process import telemetry

class Away(SpanExporter):
    given_up, by = threading.Event(), []
    def export(self, spans):
        self.given_up.wait()
        return SpanExportResult.FAILURE
    def shutdown(self):
        self.by.append(threading.current_thread() is threading.main_thread())
        self.given_up.set()

telemetry._exporter, telemetry.LAST_EXPORT_S = lambda environ: Away(), 0.1
with telemetry.tracing("test", "test-0", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}):
    trace.get_tracer("test").start_span("last").end()
assert Away.by[0] is False, "the stop waited until the processor itself gave up"
"""


def test_a_collector_that_takes_nothing_holds_up_no_stop() -> None:
    done = subprocess.run([sys.executable, "-c", _GONE], capture_output=True, text=True, timeout=100)
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
