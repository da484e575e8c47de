"""Cost of tracing: CPU time of the inference server per call, with and without a collector, in one run.

    .venv/bin/python bench/tracing.py --rounds 5 --calls 20000

One server per setting, all running at the same time with the same model; rounds interleave the servers. The table shows
the median over the rounds of each setting's time divided by the time without a collector in the same round. The
collector is a gRPC server in this process: its cost is not counted, the cost of the exporter is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import onnx
from onnx import parser as onnx_parser
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

from mesh.rpc.client.channel import Channel
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc

RATIOS: tuple[float | None, ...] = (None, 0.0, 0.001, 0.01, 0.1, 1.0)
"""Sampled shares; None is no collector."""
MODEL = """<ir_version: 10, opset_import: ["": 20]> tiny (float[n, 16] x) => (float[n, 16] y) { y = Add(x, x) }"""


class Collector(otlp_grpc.TraceServiceServicer):
    """Collector that counts its spans."""

    spans = 0

    def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> otlp.ExportTraceServiceResponse:
        self.spans += sum(len(scope.spans) for each in request.resource_spans for scope in each.scope_spans)
        return otlp.ExportTraceServiceResponse()


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """Run a collector; yield the collector and its address."""
    server, collector = grpc.server(futures.ThreadPoolExecutor(2)), Collector()
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None)


class Served:
    """A `shoal serve` with one setting of the sampler."""

    def __init__(self, models: Path, ratio: float | None, collector: str, processor: int | None) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
        if ratio is not None:
            environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector
            environ["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
            environ["OTEL_TRACES_SAMPLER_ARG"] = str(ratio)
        command = [sys.executable, "-m", "shoal.cli.main", "serve", str(models), "--port", "0", "--json"]
        self._process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        # The server prints an indented JSON object; its last line is a single brace.
        ready = json.loads("".join(iter(self._process.stdout.readline, "}\n")) + "}")
        self.address: str = ready["address"]
        self.pid: int = ready["pid"]
        if processor is not None:
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {processor})

    def cpu_s(self) -> float:
        """Return the CPU seconds of the server so far, of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


async def load(address: str, calls: int, in_flight: int) -> float:
    """Make `calls` calls, and return their duration in seconds. Raises AssertionError for a wrong answer."""
    request = pb.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 16])
    request.raw_input_contents.append(bytes(64))
    async with Channel(address) as channel:
        stub: Any = pb_grpc.GRPCInferenceServiceStub(channel)
        left = iter(range(calls))

        async def caller() -> None:
            for _ in left:
                answer = await stub.ModelInfer(request, timeout=30)
                assert len(answer.raw_output_contents[0]) == 64

        begun = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(in_flight)))
        return time.perf_counter() - begun


def measured(served: Served, calls: int, in_flight: int) -> tuple[float, float]:
    """Return the server's CPU time per call, in us, and the rate."""
    before = served.cpu_s()
    took = asyncio.run(load(served.address, calls, in_flight))
    return (served.cpu_s() - before) / calls * 1e6, calls / took


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20_000, help="calls per round and setting")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--server-cpu", type=int, default=None, help="pin the servers to this processor")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, collecting() as (collector, address):
        onnx.save(onnx_parser.parse_model(MODEL), Path(folder, "tiny.onnx"))
        servers = {ratio: Served(Path(folder), ratio, address, options.server_cpu) for ratio in RATIOS}
        try:
            for served in servers.values():
                measured(served, 2_000, options.in_flight)
            found: dict[float | None, list[tuple[float, float]]] = {ratio: [] for ratio in RATIOS}
            for number in range(options.rounds):
                order = list(servers)[:: 1 if number % 2 else -1]
                for ratio in order:
                    found[ratio].append(measured(servers[ratio], options.calls, options.in_flight))
                    time.sleep(0.2)
        finally:
            for served in servers.values():
                served.stop()
    show(found, options, collector.spans)


def show(found: dict[float | None, list[tuple[float, float]]], options: argparse.Namespace, spans: int) -> None:
    """Print medians, and ratios to the rounds without a collector."""
    print(f"{options.rounds} rounds of {options.calls} calls, {options.in_flight} in flight; {spans} spans received")
    print(f"{'sampled':>14} {'us/call':>10} {'ratio':>7} {'min':>6} {'max':>6} {'calls/s':>9}")
    base = [cpu for cpu, _ in found[None]]
    for ratio, rows in found.items():
        ratios = [cpu / without for (cpu, _), without in zip(rows, base, strict=True)]
        name = "no collector" if ratio is None else f"{ratio:.1%}"
        print(
            f"{name:>14} {statistics.median(cpu for cpu, _ in rows):10.1f} {statistics.median(ratios):7.3f}"
            f" {min(ratios):6.3f} {max(ratios):6.3f} {statistics.median(rate for _, rate in rows):9.0f}"
        )


if __name__ == "__main__":
    main()
