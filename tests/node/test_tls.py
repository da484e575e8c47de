"""A node whose gateway speaks TLS, with the real commands: `shoal up --listen 0.0.0.0:0 --tls auto --insecure`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.breakable import until
from tests.node.conftest import NodeFactory

pytestmark = pytest.mark.node

OPEN = ("--listen", "0.0.0.0:0", "--tls", "auto", "--insecure", "--services", "infer,store")


def test_commands_and_clients_use_a_node_with_tls(node: NodeFactory, onnx_models: Path, tmp_path: Path) -> None:
    running = node(*OPEN, "--tls-name", "shoal.test")
    document = running.document()
    port = document["listen"].rpartition(":")[2]
    assert (document["gateway"], document["listen"]) == (f"127.0.0.1:{port}", f"0.0.0.0:{port}")
    assert document["tls"]["has_own_ca"]
    # The screen follows the ready file.
    asyncio.run(until(lambda: "ready after" in running.output.read_text(), "the node says that it is ready"))
    for said in (f"https://0.0.0.0:{port}", document["tls"]["fingerprint"], "not authenticated"):
        assert said in running.output.read_text()

    shown = running.shoal("ca", "show")
    ca = tmp_path / "ca.pem"
    ca.write_text(shown.stdout)
    assert document["tls"]["fingerprint"] in shown.stderr
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    named = [("grpc.enable_http_proxy", 0), ("grpc.ssl_target_name_override", "shoal.test")]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=named) as channel:
        request = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING

    # Commands find the node of this machine, and its CA, by themselves.
    running.shoal("models", "push", str(onnx_models / "double.onnx"))
    answer = running.shoal("infer", "double", '{"x": [[1, 2, 3, 4]]}', "--json")
    [output] = json.loads(answer.stdout)["outputs"]
    assert output["data"] == [[2, 4, 6, 8]]
    status = json.loads(running.shoal("status", "--json").stdout)
    assert (status["gateway"], status["envoy"]["admin"]) == (f"https://127.0.0.1:{port}", document["admin"])

    # As if from another machine.
    running.shoal("context", "add", "far", f"https://localhost:{port}", "--ca", str(ca))
    assert "local/infer-0" in running.shoal("status", "--gateway", "far").stdout
    untrusted = running.shoal("status", "--gateway", f"https://localhost:{port}", check=False)
    assert (untrusted.returncode, "is not trusted" in untrusted.stderr) == (1, True), untrusted.stderr
    plain = running.shoal("status", "--gateway", f"localhost:{port}", check=False)
    assert (plain.returncode, f"call https://localhost:{port}" in plain.stderr) == (1, True), plain.stderr
