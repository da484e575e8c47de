"""A node whose gateway speaks TLS, with the real commands: `shoal up --listen 0.0.0.0:0 --tls auto --insecure`."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shoal
from tests.breakable import until
from tests.node.conftest import Node, NodeFactory

pytestmark = pytest.mark.node

OPEN = ("--listen", "0.0.0.0:0", "--tls", "auto", "--insecure")


def is_serving(address: str, ca: Path) -> bool:
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    with grpc.secure_channel(address, credentials, options=[("grpc.enable_http_proxy", 0)]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def serial(port: int, ca: Path) -> int:
    """The serial number of the certificate that the gateway serves."""
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        found = sock.getpeercert()
    assert found is not None
    return int(str(found["serialNumber"]), 16)


def test_commands_and_clients_use_a_node_with_tls_and_a_restart_keeps_the_ca(
    node: NodeFactory, onnx_models: Path, tmp_path: Path
) -> None:
    running: Node = node(*OPEN, "--tls-name", "shoal.test")
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
    assert is_serving(f"localhost:{port}", ca)
    first = serial(int(port), ca)

    # Commands find the node of this machine, and its CA, by themselves.
    running.shoal("models", "push", str(onnx_models / "double.onnx"))
    answer = running.shoal("infer", "double", '{"x": [[1, 2, 3, 4]]}', "--json")
    [output] = json.loads(answer.stdout)["outputs"]
    assert output["data"] == [[2, 4, 6, 8]]
    status = json.loads(running.shoal("status", "--json").stdout)
    assert (status["gateway"], status["problems"]) == (f"https://127.0.0.1:{port}", [])
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"x": [[1, 2, 3, 4]]}\n')
    assert '"line": 1' in running.shoal("jobs", "run", "double", str(lines)).stdout

    # As if from another machine: by a context, and in a program.
    running.shoal("context", "add", "far", f"https://localhost:{port}", "--ca", str(ca))
    assert "local/infer-0" in running.shoal("status", "--gateway", "far").stdout
    with shoal.Client(f"https://localhost:{port}", ca=ca) as client:
        assert client.infer("double", {"x": np.ones((1, 4), np.float32)}, timeout=30)["y"].tolist() == [[2.0] * 4]
    untrusted = running.shoal("status", "--gateway", f"https://localhost:{port}", check=False)
    assert (untrusted.returncode, "is not trusted" in untrusted.stderr) == (1, True), untrusted.stderr
    plain = running.shoal("status", "--gateway", f"localhost:{port}", check=False)
    assert (plain.returncode, f"call https://localhost:{port}" in plain.stderr) == (1, True), plain.stderr
    assert running.stop() == 0

    again: Node = node(*OPEN, "--services", "coord", data_dir=running.data_dir)
    assert again.document()["tls"]["fingerprint"] == document["tls"]["fingerprint"]
    port = again.document()["listen"].rpartition(":")[2]
    assert serial(int(port), ca) != first
