"""Triton's perf_analyzer, as its wheel has it: it looks at metadata, configuration and statistics, and it measures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.clients.conftest import Run
from tests.infer.conformance.instance import Instance

WAYS = {
    "unary": [],
    "asynchronous": ["--async", "--concurrency-range", "8"],
    "streaming": ["--async", "--streaming", "--concurrency-range", "4"],
    "batches of 8": ["-b", "8", "--concurrency-range", "2"],
    "shared channel, compressed": ["--grpc-compression-algorithm", "gzip"],
    "a rate": ["--request-rate-range", "200"],
}


@pytest.mark.parametrize("way", WAYS)
def test_it_measures(served: Instance, run: Run, repository_root: Path, tmp_path: Path, way: str) -> None:
    tool = repository_root / ".venv-tritonclient/bin/perf_analyzer"
    if not tool.exists():
        pytest.fail("perf_analyzer is in the environment of tritonclient: run `make test`")
    # Three measurements of half a second, however much they differ: it is not the speed that is tested.
    patience = ["--measurement-interval", "500", "--stability-percentage", "999", "--max-trials", "3"]
    report = tmp_path / "report.csv"
    said = run([tool, "-m", "double", "-i", "grpc", "-u", served.address, "-f", report, *patience, *WAYS[way]])
    (row,) = csv.DictReader(report.open())
    assert float(row["Inferences/Second"]) > 0, said
    # What the server's statistics say, read by the tool: it knows the model's own share of the time.
    assert float(row["Server Compute Infer"]) >= 0, said


HTTP_WAYS = {
    "unary": [],
    "asynchronous": ["--async", "--concurrency-range", "8"],
    "batches of 8 as JSON": ["-b", "8", "--input-tensor-format", "json", "--output-tensor-format", "json"],
}


@pytest.mark.parametrize("way", HTTP_WAYS)
def test_it_measures_over_http(served: Instance, run: Run, repository_root: Path, tmp_path: Path, way: str) -> None:
    tool = repository_root / ".venv-tritonclient/bin/perf_analyzer"
    report = tmp_path / "report.csv"
    patience = ["--measurement-interval", "500", "--stability-percentage", "999", "--max-trials", "3"]
    run([tool, "-m", "double", "-i", "http", "-u", served.address, "-f", report, *patience, *HTTP_WAYS[way]])
    (row,) = csv.DictReader(report.open())
    assert float(row["Inferences/Second"]) > 0
    assert float(row["Server Compute Infer"]) >= 0
