"""An unmodified tritonclient and an instance that stands alone: what a user of Triton does, beyond plain calls."""

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
    script = Path(__file__).parent / "python/tritonclient_calls.py"
    identity = tmp_path_factory.mktemp("identity") / "model.onnx"
    identity.write_bytes(onnx_files.identity().SerializeToString())
    said: dict[str, Any] = json.loads(run([python, script, served.address, identity]))
    return said


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_it_knows_the_server(report: dict[str, Any], client: str) -> None:
    seen = report[client]
    assert (seen["live"], seen["ready"], seen["model ready"]) == (True, True, True)
    assert seen["server"]["name"] == "shoal"
    assert seen["metadata"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert seen["config"]["config"]["max_batch_size"] == 64
    assert {row["name"] for row in seen["index"]["models"]} >= {"double", "patient", "wide", "classes", "repeat"}


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_it_infers(report: dict[str, Any], client: str) -> None:
    seen = report[client]
    assert seen["infer"] == [[2, 4, 6, 8]]
    assert seen["classification"] == [["4.000000:3", "3.000000:2", "2.000000:1:bee"]]
    assert seen["compressed"] == {"gzip": [64, 4], "deflate": [64, 4]}
    assert seen["parameters"] == [[2, 4, 6, 8]]
    assert seen["unknown"] == ["StatusCode.NOT_FOUND", "Request for unknown model: 'nope' is not found"]
    assert seen["timeout"][0] == "StatusCode.DEADLINE_EXCEEDED"


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_streams(report: dict[str, Any], client: str) -> None:
    seen = report[client]
    assert seen["stream"] == [[2, 4, 6, 8], "Request for unknown model: 'nope' is not found", [2, 4, 6, 8]]
    assert seen["decoupled"] == [0, 1, 2]
    if client == "sync":  # The asyncio one has no way to ask for it.
        assert seen["decoupled, final"] == [0, 1, 2, "final"]


def test_bytes_of_an_image_come_back_as_pixels(report: dict[str, Any]) -> None:
    assert report["sync"]["image"] == [[[[255, 0, 0]], [[0, 0, 255]]]]
    code, message = report["sync"]["no image"]
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("model 'decode': input 'image': expected jpeg, png, webp, bmp")


def test_an_ensemble_is_a_model(report: dict[str, Any]) -> None:
    assert report["sync"]["ensemble"] == [[4, 8, 12, 16]]
    assert report["sync"]["ensemble, metadata"]["platform"] == "ensemble"


def test_async_infer(report: dict[str, Any]) -> None:
    assert report["callbacks"] == [2 * n for n in range(8)]


def test_statistics(report: dict[str, Any]) -> None:
    (row,) = report["statistics"]["model_stats"]
    assert (row["name"], row["version"]) == ("double", "1")
    assert int(row["inference_stats"]["success"]["count"]) >= 10
    assert int(row["inference_count"]) >= int(row["execution_count"]) > 0


def test_load_and_unload(report: dict[str, Any]) -> None:
    """With `config` and a file a model is what was sent, until it is loaded anew."""
    seen = report["loading"]
    assert seen["unloaded ready"] is False
    assert seen["unloaded infer"][0] in ("StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE")
    assert seen["loaded"] == [[2, 4, 6, 8]]
    assert seen["overridden batch size"] == 3
    assert seen["overridden"] == [[1, 2, 3, 4]]
    assert seen["loaded again"] == [[2, 4, 6, 8]]
    assert seen["unknown"][0] == "StatusCode.INTERNAL"
    assert seen["unknown"][1].startswith("failed to load 'nope'")
