"""A real VictoriaMetrics takes a server's metrics over OTLP; PromQL finds them by the names of docs/metrics.md."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import shoal
from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.node.conftest import Start
from tests.prometheus_binaries import find_binary

pytestmark = pytest.mark.node

SHIPPED = Path("deploy/observability/victoriametrics.env")
# Value by query, after five requests.
QUERIES = {
    'sum(shoal_infer_requests_total{model="double",version="1",outcome="success"})': 5,
    'sum(shoal_infer_request_duration_seconds_bucket{le="+Inf",model="double"})': 5,
    'sum(shoal_infer_model_ready{service_name="shoal-infer",model="double"})': 1,
    'histogram_quantile(1, sum by (le) (shoal_infer_request_duration_seconds_bucket{model="double"})) > bool 0': 1,
    "count(process_memory_usage_bytes) > bool 0": 1,
}


def test_metrics_sent_over_otlp_are_found(
    start: Start, onnx_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = find_binary("victoria-metrics")
    if binary is None:
        pytest.skip("needs VictoriaMetrics: run tools/prometheus.sh")
    address = f"127.0.0.1:{free_port()}"
    # Without the last one, fresh points stay hidden for 30 s.
    flags = ("-opentelemetry.usePrometheusNaming", "-search.latencyOffset=0s")
    for line in SHIPPED.read_text().splitlines():
        if not line.startswith("#"):
            name, _, value = line.partition("=")
            monkeypatch.setenv(name, value.replace("127.0.0.1:8428", address))
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1000")
    argv = [binary, f"-httpListenAddr={address}", f"-storageDataPath={tmp_path}/data", *flags]
    with Process(argv, tmp_path / "victoria-metrics.log"):
        _, said = start(str(onnx_models / "double.onnx"), "--workers", "1")
        with shoal.Client(said["address"]) as client:
            for _ in range(5):
                client.infer("double", {"x": np.ones((1, 4), np.float32)})
        for text, value in QUERIES.items():
            asyncio.run(until(partial(_is_found, address, text, value), text, 60, every_s=0.2))


def _is_found(address: str, text: str, value: float) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?query={urllib.parse.quote(text)}") as response:
            found = json.load(response)["data"]["result"]
    except urllib.error.URLError:
        return False
    return [float(each["value"][1]) for each in found] == [value]
