"""REST through a node's gateway, routed by the model in the path, and an unmodified tritonclient over HTTP."""

from __future__ import annotations

import http.client
import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import shoal
from tests.infer import onnx_files
from tests.node.conftest import Node

pytestmark = pytest.mark.node

PATIENCE_S = 60.0
TENSOR = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
CLIENT = """
import json, sys
import numpy as np
import tritonclient.http as triton

with triton.InferenceServerClient(sys.argv[1]) as client:
    x = triton.InferInput("x", [2, 4], "FP32")
    x.set_data_from_numpy(np.arange(8, dtype=np.float32).reshape(2, 4))
    print(json.dumps({
        "ready": [client.is_server_live(), client.is_server_ready(), client.is_model_ready("double")],
        "metadata": client.get_model_metadata("double")["inputs"],
        "infer": [client.infer("double", [x]).as_numpy("y").tolist() for _ in range(4)],
        "async": [call.get_result().as_numpy("y").tolist() for call in [client.async_infer("double", [x])]],
    }))
"""


def call(node: Node, method: str, path: str, document: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(node.gateway, timeout=PATIENCE_S)
    try:
        connection.request(method, path, None if document is None else json.dumps(document))
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    return response.status, json.loads(text) if text else None


def infer(node: Node, model: str, **more: Any) -> tuple[int, Any]:
    return call(node, "POST", f"/v2/models/{model}/infer", {"inputs": [TENSOR], **more})


def test_both_replicas_answer_over_rest(running: Node) -> None:
    seen = set()
    for _ in range(50):
        status, found = infer(running, "double", parameters={"explain": True})
        assert (status, found["outputs"][0]["data"]) == (200, [2, 4, 6, 8])
        seen.add(found["parameters"]["replica"])
    assert len(seen) == 2


def test_statistics_are_those_of_all_replicas(running: Node) -> None:
    def counted(path: str) -> int:
        status, found = call(running, "GET", path)
        assert status == 200, found
        (stats,) = (stats for stats in found["model_stats"] if stats["name"] == "double")
        return int(stats["inference_stats"]["success"]["count"])

    for path in ("/v2/models/double/stats", "/v2/models/double/versions/1/stats", "/v2/models/stats"):
        before = counted(path)
        for _ in range(20):
            assert infer(running, "double")[0] == 200
        assert counted(path) == before + 20, path
    assert call(running, "GET", "/v2/models/none/stats")[0] == 400


def test_operations_and_errors(running: Node) -> None:
    assert call(running, "GET", "/v2/health/live") == (200, {"live": True})
    assert call(running, "GET", "/v2/health/ready") == (200, {"ready": True})
    assert call(running, "HEAD", "/v2/health/ready") == (200, None)
    assert call(running, "GET", "/v2/models/double/ready") == (200, None)
    assert call(running, "GET", "/v2/models/double?x=y")[1]["name"] == "double"
    assert {row["name"] for row in call(running, "POST", "/v2/repository/index")[1]} == {"double", "slow"}
    assert infer(running, "none") == (404, {"error": "Request for unknown model: 'none' is not found"})
    assert call(running, "GET", "/v2/nothing") == (404, {"error": "no call GET /v2/nothing"})
    assert call(running, "GET", "/v2x")[0] == 404
    assert infer(running, "double/versions/7")[0] == 404
    status, found = call(running, "POST", "/v2/repository/models/double/unload")
    assert (status, "--model-control explicit" in found["error"]) == (400, True)


def test_names_are_routed_as_they_are_read(running: Node, tmp_path: Path) -> None:
    """Each way to write a name reaches the model of that name, or none."""
    (tmp_path / "a.b-c_d").mkdir()
    model = tmp_path / "a.b-c_d" / "model.onnx"
    model.write_bytes(onnx_files.scale(3).SerializeToString())
    with shoal.Client(running.gateway) as client:
        client.models.push(model, name="a.b-c_d")
    for written in ("a.b-c_d", quote("a.b-c_d", safe=""), "%61.b-c_d", "a%2eb-c_d"):
        status, found = infer(running, written)
        assert (status, found["outputs"][0]["data"]) == (200, [3, 6, 9, 12]), written
    for written in ("a.b-c_d%2f..%2fdouble", "%2561.b-c_d", "a.b-c_d;double", "a.b-c_d%20"):
        assert infer(running, written)[0] in (400, 404), written


def test_an_unmodified_tritonclient(running: Node, repository_root: Path) -> None:
    python = repository_root / ".venv-tritonclient/bin/python"
    done = subprocess.run([python, "-c", CLIENT, running.gateway], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    assert seen["ready"] == [True] * 3
    assert seen["metadata"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert seen["infer"] + seen["async"] == [[[0, 2, 4, 6], [8, 10, 12, 14]]] * 5
