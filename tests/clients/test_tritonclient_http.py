"""An unmodified tritonclient over HTTP, synchronous and asyncio, and curl, against an instance that stands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Run
from tests.infer import onnx_files
from tests.infer.conformance.instance import Instance


@pytest.fixture(scope="session")
def report(
    served: Instance, run: Run, repository_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Everything that the client saw."""
    python = repository_root / ".venv-tritonclient/bin/python"
    if not python.exists():
        pytest.fail("tritonclient has an environment of its own: run `make test`")
    script = Path(__file__).parent / "python/tritonclient_http_calls.py"
    identity = tmp_path_factory.mktemp("identity") / "model.onnx"
    identity.write_bytes(onnx_files.identity().SerializeToString())
    said: dict[str, Any] = json.loads(run([python, script, served.address, identity]))
    return said


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_it_knows_the_server(report: dict[str, Any], client: str) -> None:
    seen = report[client]
    assert (seen["live"], seen["ready"], seen["model ready"]) == (True, True, True)
    assert seen["server"]["name"] == "shoal"
    assert "binary_tensor_data" in seen["server"]["extensions"]
    assert seen["metadata"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_it_infers_in_each_form_of_tensors(report: dict[str, Any], client: str) -> None:
    seen = report[client]
    assert len(seen["infer"]) == 5
    assert all(values == [[2, 4, 6, 8]] for values in seen["infer"].values()), seen["infer"]
    assert seen["unknown"] == ["404", "Request for unknown model: 'nope' is not found"]


def test_it_reads_configuration_index_and_statistics(report: dict[str, Any]) -> None:
    seen = report["sync"]
    assert (seen["version ready"], seen["nope ready"]) == (True, False)
    assert seen["config"]["max_batch_size"] == 64
    assert {row["name"] for row in seen["index"]} >= {"double", "patient", "wide", "classes", "repeat"}
    (row,) = seen["statistics"]["model_stats"]
    assert (row["name"], row["version"]) == ("double", "1")
    assert row["inference_stats"]["success"]["count"] >= 5
    assert len(seen["all statistics"]["model_stats"]) >= 5


def test_it_infers_with_versions_parameters_tenants_classes_and_compression(report: dict[str, Any]) -> None:
    seen = report["sync"]
    assert seen["tenant"] == seen["parameters"] == seen["version"] == [[2, 4, 6, 8]]
    assert seen["ensemble"] == [[4, 8, 12, 16]]
    assert seen["classification"] == [["4.000000:3", "3.000000:2", "2.000000:1:bee"]]
    assert seen["compressed"] == [[64, 4]] * 4
    assert seen["large"] is True
    assert seen["async"] == [2 * n for n in range(8)]
    assert report["aio"]["many"] == [2 * n for n in range(64)]


def test_errors_are_named(report: dict[str, Any]) -> None:
    seen = report["sync"]
    assert seen["wrong"][0] == "400"
    assert seen["wrong"][1].startswith("expected 1 inputs but got 0 for model 'double'")
    assert seen["decoupled"][1] == "HTTP end point doesn't support models with decoupled transaction policy"


def test_load_and_unload(report: dict[str, Any]) -> None:
    """With `config` and a file a model is what was sent, until it is loaded anew."""
    seen = report["sync"]
    assert seen["unloaded ready"] is False
    assert seen["overridden"] == [3, [[1, 2, 3, 4]]]
    assert seen["loaded again"] == [[2, 4, 6, 8]]
    assert seen["load nope"][1].startswith("failed to load 'nope'")


CURL = ["curl", "-sS", "--max-time", "60", "--noproxy", "*"]


@pytest.mark.parametrize("protocol", ["--http1.1", "--http2", "--http2-prior-knowledge"])
def test_curl_infers_over_each_version_of_http(served: Instance, run: Run, protocol: str) -> None:
    url = f"http://{served.address}/v2"
    request = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [[1, 2, 3, 4]]}]}
    said = json.loads(run([*CURL, protocol, f"{url}/models/wide/infer", "-d", json.dumps(request)]))
    assert said["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0, 4.0, 6.0, 8.0]}]
    assert run([*CURL, protocol, "-o", "/dev/null", "-w", "%{http_code}", f"{url}/health/ready"]) == "200"
    compressed = run([*CURL, protocol, "--compressed", f"{url}/models/wide/config"])
    assert json.loads(compressed)["name"] == "wide"


def test_curl_sends_a_body_in_chunks_and_large_ones_after_100_continue(
    served: Instance, run: Run, tmp_path: Path
) -> None:
    count = 100_000
    body = tmp_path / "body.json"
    tensor = {"name": "x", "shape": [count // 4, 4], "datatype": "FP32", "data": [1.5] * count}
    body.write_text(json.dumps({"inputs": [tensor]}))
    url = f"http://{served.address}/v2/models/wide/infer"
    for more in (["-H", "Transfer-Encoding: chunked"], ["-H", "Expect: 100-continue"]):
        said = json.loads(run([*CURL, url, "--data-binary", f"@{body}", *more]))
        assert said["outputs"][0]["data"] == [3.0] * count


def test_curl_streams_the_responses_of_a_decoupled_model(served: Instance, run: Run) -> None:
    url = f"http://{served.address}/v2/models/repeat/generate_stream"
    said = run([*CURL, "-N", url, "-d", json.dumps({"times": 3})])
    events = [json.loads(event.removeprefix("data: ")) for event in said.split("\n\n") if event]
    assert [event["n"] for event in events] == [0, 1, 2]
