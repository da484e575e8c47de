"""A Node program with @grpc/grpc-js, which loads our .proto files at run time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Run
from tests.infer.conformance.instance import Instance

UNKNOWN = "Request for unknown model: 'nope' is not found"
INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, CANCELLED = 3, 4, 5, 1


@pytest.fixture(scope="session")
def report(served: Instance, run: Run, repository_root: Path) -> dict[str, Any]:
    """Everything that the client saw."""
    folder = repository_root / "tests/clients/node"
    if shutil.which("node") is None or not (folder / "node_modules").exists():
        pytest.fail("the Node client needs its packages: run tools/clients.sh")
    said: dict[str, Any] = json.loads(run(["node", folder / "client.js", served.address, repository_root / "proto"]))
    return said


def test_what_is_served(report: dict[str, Any]) -> None:
    assert (report["live"], report["ready"]) == (True, True)
    assert report["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert "double READY" in report["index"]
    assert (report["config"], report["statistics"]) == (64, 1)


def test_infer(report: dict[str, Any]) -> None:
    assert report["id"] == "n1"
    assert report["infer"] == report["typed"] == [2, 4, 6, 8]
    assert (report["many"], report["large"]) == (True, True)


def test_errors(report: dict[str, Any]) -> None:
    assert report["unknown"] == {"code": NOT_FOUND, "details": UNKNOWN}
    assert report["invalid"] == INVALID_ARGUMENT
    assert (report["deadline"], report["cancelled"]) == (DEADLINE_EXCEEDED, CANCELLED)


def test_stream(report: dict[str, Any]) -> None:
    assert report["stream"] == [[2, 2, 2, 2], UNKNOWN, [2, 2, 2, 2]]
