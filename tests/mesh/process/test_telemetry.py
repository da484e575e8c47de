"""Tracing ends with its process, also when the collector does not accept the last spans."""

from __future__ import annotations

import subprocess
import sys

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
