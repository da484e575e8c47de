"""An unmodified tritonclient against a node's gateway: every call, and the table of errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.node

# What each mistake is answered with: code, and what the message must name.
ERRORS = {
    "unknown model": ("NOT_FOUND", ["Request for unknown model: 'nope' is not found"]),
    "unknown version": ("NOT_FOUND", ["'double' version 7 is not found"]),
    "version not a number": ("INVALID_ARGUMENT", ["failed to get model version from specified version string 'abc'"]),
    "unknown input": ("INVALID_ARGUMENT", ["z", "x"]),
    "missing input": ("INVALID_ARGUMENT", ["x"]),
    "wrong dtype": ("INVALID_ARGUMENT", ["x", "FP32", "FP64"]),
    "wrong shape": ("INVALID_ARGUMENT", ["x", "4", "5"]),
    "byte size mismatch": ("INVALID_ARGUMENT", ["x", "16", "15"]),
    "raw and contents": ("INVALID_ARGUMENT", ["x"]),
    "no data": ("INVALID_ARGUMENT", ["x"]),
    "input given twice": ("INVALID_ARGUMENT", ["x"]),
    "unknown output": ("INVALID_ARGUMENT", ["nope"]),
    "batch over max": ("INVALID_ARGUMENT", ["1000", "64"]),
    "wrong parameter type": ("INVALID_ARGUMENT", ["timeout"]),
    "reserved parameter": ("INVALID_ARGUMENT", ["triton_secret"]),
    "metadata of unknown": ("NOT_FOUND", ["nope"]),
    "config of unknown": ("NOT_FOUND", ["nope"]),
    "statistics of unknown": ("INVALID_ARGUMENT", ["requested model 'nope' is not available"]),
    "load": ("FAILED_PRECONDITION", ["load / unload is not allowed", "--model-control explicit"]),
    "unload": ("FAILED_PRECONDITION", ["load / unload is not allowed", "--model-control explicit"]),
    "shared memory": ("UNIMPLEMENTED", []),
}
DOUBLED = [[0.0, 2.0, 4.0, 6.0], [8.0, 10.0, 12.0, 14.0]]


@pytest.fixture(scope="module")
def report(running: Any, repository_root: Path) -> dict[str, Any]:
    """Everything that the client saw."""
    python = repository_root / ".venv-tritonclient/bin/python"
    if not python.exists():
        pytest.fail("tritonclient has an environment of its own: run `make test`")
    script = Path(__file__).parent / "foreign/tritonclient_calls.py"
    done = subprocess.run([python, script, running.gateway], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_health(report: dict[str, Any]) -> None:
    assert (report["live"], report["ready"], report["model ready"]) == (True, True, True)
    assert report["unknown model ready"] is False


def test_metadata(report: dict[str, Any]) -> None:
    assert report["server"]["name"] == "shoal"
    assert report["metadata"]["name"] == "double"
    assert report["metadata"]["versions"] == ["1"]
    assert report["metadata"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert report["metadata"]["outputs"] == [{"name": "y", "datatype": "FP32", "shape": ["-1", "4"]}]


def test_config_is_completed_from_the_model(report: dict[str, Any]) -> None:
    assert report["config"]["name"] == "double"
    assert report["config"]["max_batch_size"] == 64
    assert report["config"]["input"][0]["data_type"] == "TYPE_FP32"
    assert report["config"]["input"][0]["dims"] == ["4"]


def test_index(report: dict[str, Any]) -> None:
    found = [(m["name"], m["version"], m["state"]) for m in report["index"]["models"]]
    assert found == [("double", "1", "READY"), ("slow", "1", "READY")]


def test_infer(report: dict[str, Any]) -> None:
    for key in ("infer", "headers", "priority"):
        assert report[key] == DOUBLED, key
    assert report["infer id"] == "r1"
    assert report["gzip"] == [64, 4]
    assert report["classification"] == [["6.000000:3", "4.000000:2"]]


def test_many_at_once(report: dict[str, Any]) -> None:
    assert report["async"] == [[2.0 * n] * 4 for n in range(8)]
    assert report["aio"] == [DOUBLED[0]] * 16


def test_an_error_on_a_stream_does_not_end_it(report: dict[str, Any]) -> None:
    assert report["stream"] == [DOUBLED[0], "error", DOUBLED[0]]


@pytest.mark.parametrize("case", ERRORS)
def test_errors(report: dict[str, Any], case: str) -> None:
    code, named = ERRORS[case]
    status, message = report["errors"][case]
    assert status == f"StatusCode.{code}", message
    assert all(name in message for name in named), message


def test_statistics_count_what_was_answered(report: dict[str, Any]) -> None:
    stats = report["statistics"]["model_stats"][0]
    assert stats["name"] == "double"
    # One of two replicas answers, so only a share of the calls is seen; but it is consistent.
    success = int(stats["inference_stats"]["success"]["count"])
    assert success > 0
    assert int(stats["inference_count"]) >= int(stats["execution_count"]) > 0
