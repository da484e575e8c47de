"""REST at the addresses of `shoal serve`: straight and behind Envoy, at --port and --http-port, with TLS."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.infer import onnx_files
from tests.infer.conformance.instance import FRONTS
from tests.node.conftest import Start

PATIENCE_S = 60.0
REQUEST = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "double.onnx").write_bytes(onnx_files.scale(2).SerializeToString())
    return tmp_path / "models"


def call(connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
    connection.request(method, path, body)
    response = connection.getresponse()
    text = response.read()
    return response.status, json.loads(text) if text else None


def check(connection: http.client.HTTPConnection) -> None:
    """Make some requests on one connection."""
    try:
        for _ in range(2):
            status, found = call(connection, "POST", "/v2/models/double/infer", REQUEST)
            assert (status, found["outputs"][0]["data"]) == (200, [2, 4, 6, 8])
        assert call(connection, "GET", "/v2/health/ready") == (200, {"ready": True})
        assert call(connection, "GET", "/v2/nothing") == (404, {"error": "no call GET /v2/nothing"})
        unknown = "Request for unknown model: 'none' is not found"
        assert call(connection, "GET", "/v2/models/none") == (404, {"error": unknown})
    finally:
        connection.close()


@pytest.mark.parametrize("front", FRONTS)
def test_rest_is_served_at_both_ports(start: Start, models: Path, front: str) -> None:
    _, said = start(str(models), "--front", front, "--http-port", "0", "--workers", "2")
    assert said["http_address"] != said["address"]
    for address in (said["address"], said["http_address"]):
        check(http.client.HTTPConnection(address, timeout=PATIENCE_S))


def test_rest_over_tls(start: Start, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    _, said = start(str(models), "--tls", "auto")
    context = ssl.create_default_context(cafile=said["tls"]["ca"])
    context.set_alpn_protocols(["http/1.1"])
    check(http.client.HTTPSConnection(said["address"], timeout=PATIENCE_S, context=context))


@pytest.mark.parametrize("front", FRONTS)
def test_a_web_page_reaches_nothing(start: Start, models: Path, front: str) -> None:
    _, said = start(str(models), "--front", front)
    for headers, status in (
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 421),
        ({}, 200),
    ):
        connection = http.client.HTTPConnection(said["address"], timeout=PATIENCE_S)
        try:
            connection.request("POST", "/v2/models/double/infer", REQUEST, headers)
            assert connection.getresponse().status == status, headers
        finally:
            connection.close()
