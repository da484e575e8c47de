"""`shoal trace` on a node: a request and a job in all processes that they crossed, and errors that name the command."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytestmark = pytest.mark.node

INPUT = '{"x": [[1, 2, 3, 4]]}'


def spans_of(running: Any, id: str) -> set[tuple[str, str]]:
    """Service and name of each span."""
    document = json.loads(running.shoal("trace", id, "--json").stdout)
    assert document["silent"] == []
    return {(re.split(r"[/-]", span["instance"])[1], span["name"]) for span in document["spans"]}


def test_a_request_is_shown_with_its_time(running: Any) -> None:
    done = running.shoal("infer", "double", INPUT, "--explain")
    [command] = re.findall(r"^trace: shoal (.+)$", done.stderr, re.MULTILINE)
    assert "--gateway" not in command
    shown = running.shoal(*command.split()).stdout
    assert re.search(r"█.* ms +infer-\d +GRPCInferenceService/ModelInfer", shown), shown


def test_a_job_is_shown_in_each_process_that_it_crossed(running: Any) -> None:
    job = running.shoal("jobs", "submit", "double", INPUT).stdout.strip()
    running.shoal("jobs", "result", job)
    found = spans_of(running, job)
    assert ("ingest", "attempt") in found
    assert ("ingest", "shoal.ingest.v1.IngestService/Submit") in found
    assert any(service == "infer" for service, _ in found)
    assert any(service == "store" for service, _ in found)
    shown = running.shoal("trace", job).stdout
    assert f"job={job}" in shown
