"""One trace crosses every hop: client, Envoy, ingest, Envoy, infer, and the store; and the logs carry it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

pytestmark = pytest.mark.node

CLIENT = """
import numpy as np, os, sys
from mesh.process.telemetry import tracing
from opentelemetry import trace
import shoal
with tracing("client", "test"):
    with trace.get_tracer("test").start_as_current_span("the user's own") as span:
        with shoal.Client(sys.argv[1]) as client:
            for _ in range(3):
                client.infer("double", {"x": np.ones((1, 4), np.float32)})
            job = client.jobs.submit("double", {"x": np.ones((1, 4), np.float32)})
            client.jobs.result(job.id, timeout=60)
        print(trace.format_trace_id(span.get_span_context().trace_id))
"""


class Collector(otlp_grpc.TraceServiceServicer):
    """A real OTLP receiver: keeps (service, span name) by trace id, and the paths that calls of a method took."""

    def __init__(self) -> None:
        self.spans: dict[str, set[tuple[str, str]]] = {}
        self.paths: dict[tuple[str, str], set[str]] = {}
        self._lock = threading.Lock()

    def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> otlp.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        entry = (names.get("service.name", "?"), span.name)
                        self.spans.setdefault(span.trace_id.hex(), set()).add(entry)
                        found = [a.value.string_value for a in span.attributes if a.key == "shoal.path"]
                        self.paths.setdefault(entry, set()).update(found)
        return otlp.ExportTraceServiceResponse()


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    collector = Collector()
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None)


def eventually(condition: Callable[[], bool], within_s: float = 60) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_one_trace_crosses_every_hop(collector: tuple[Collector, str], node: Any, onnx_models: Path) -> None:
    received, endpoint = collector
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    running = node(env=env)
    running.shoal("models", "push", str(onnx_models / "double.onnx"))
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, running.gateway],
        env={**running.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    trace_id = done.stdout.strip()

    # Each process exports by itself, and when it likes: a hop counts once its span has come.
    hops = {
        ("shoal-client", "the user's own"),
        ("shoal-infer", "inference.GRPCInferenceService/ModelInfer"),
        ("shoal-ingest", "shoal.ingest.v1.IngestService/Submit"),
        ("shoal-store", "shoal.store.v1.StoreService/PutResults"),
    }

    def spans() -> set[tuple[str, str]]:
        return set(received.spans.get(trace_id, ()))

    assert eventually(lambda: hops <= spans()), f"missing {hops - spans()} of {spans()}"
    assert eventually(lambda: "shoal-envoy" in {service for service, _ in spans()}), f"no span of Envoy: {spans()}"
    # Naming a collector switches no fast path off.
    fast = hops - {("shoal-client", "the user's own")}
    assert {hop: received.paths[hop] for hop in fast} == {hop: {"fast"} for hop in fast}
    assert not any("Health" in name for names in received.spans.values() for _, name in names)
