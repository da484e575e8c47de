"""`shoal trace` on a node: a request and a job in all processes that they crossed, sampled, failed or slow."""

from __future__ import annotations

import http.client
import json
import re
import secrets
import time
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.errors import TRACE_KEY, InvalidArgument
from tests.node.conftest import python_model

pytestmark = pytest.mark.node

INPUT = '{"x": [[1, 2, 3, 4]]}'
FAILS, SLOW, FAST = 666, 2, 1
SLOW_S = 1.0
MOODY = f"""
import time

class Model:
    inputs = {{"x": ("FP32", [-1, 4])}}
    outputs = {{"y": ("FP32", [-1, 4])}}

    def predict(self, batch):
        x = batch["x"]
        if (x == {FAILS}).any():
            raise RuntimeError("moody")
        if (x == {SLOW}).any():
            time.sleep(1.1)
        return {{"y": 2 * x}}
"""


@pytest.fixture(scope="module")
def moody(running: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The node, with a model that fails or is slow, by its input."""
    running.shoal("models", "push", str(python_model(tmp_path_factory.mktemp("models") / "moody", MOODY)))
    return running


def infer(node: Any, value: float, **headers: str) -> tuple[int, str]:
    """The status of an inference over REST, and the trace that its response names."""
    connection = http.client.HTTPConnection(node.gateway, timeout=60)
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}
    connection.request("POST", "/v2/models/moody/infer", json.dumps({"inputs": [tensor]}), headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, response.headers.get(TRACE_KEY, "")


def unsampled() -> tuple[str, dict[str, str]]:
    """A new trace that is not sampled, and its header."""
    trace = secrets.token_hex(16)
    return trace, {"traceparent": f"00-{trace}-00f067aa0ba902b7-00"}


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


def test_a_failed_call_names_a_trace_that_shows_it(moody: Any) -> None:
    status, trace = infer(moody, FAILS)
    assert status == 500
    shown = moody.shoal("trace", trace).stdout
    assert re.search(r"infer-\d +GRPCInferenceService/ModelInfer", shown), shown
    assert "moody" in shown
    assert trace[:16] in moody.shoal("trace").stdout


def test_a_slow_call_is_kept_and_a_fast_one_is_not(moody: Any) -> None:
    trace, header = unsampled()
    assert infer(moody, SLOW, **header)[0] == 200
    [span] = json.loads(moody.shoal("trace", trace, "--json").stdout)["spans"]
    assert (span["parent"], span["error"], span["attributes"]["shoal.model"]) == ("00f067aa0ba902b7", "", "moody")
    assert span["end_ns"] - span["start_ns"] >= 1_000_000_000
    while True:
        trace, header = unsampled()
        began = time.monotonic()
        found = infer(moody, FAST, **header)
        # On a machine that stands still meanwhile, it is slow.
        if time.monotonic() - began < SLOW_S:
            break
    assert found == (200, "")
    missing = moody.shoal("trace", trace, check=False)
    assert (missing.returncode, "has a span of" in missing.stderr) == (1, True)


def test_a_failed_job_without_a_trace_shows_its_attempt_in_both_processes(moody: Any) -> None:
    with shoal.Client(moody.gateway) as client:
        job = client.jobs.submit("moody", {"x": [[FAILS] * 4]}, retry=shoal.JobRetry(max_attempts=1))
        *_, last = client.jobs.watch(job.id)
        assert last.state == "dead"
    document = json.loads(moody.shoal("trace", job.id, "--json").stdout)
    # Others are kept when the machine is so busy that they are slow.
    failed = [span for span in document["spans"] if span["error"]]
    found = {(re.split(r"[/-]", span["instance"])[1], span["name"]) for span in failed}
    assert found == {("ingest", "attempt"), ("infer", "inference.GRPCInferenceService/ModelInfer")}
    assert len({span["trace"] for span in document["spans"]}) == 1
    assert "moody" in moody.shoal("trace", job.id).stdout


def test_another_machine_reads_the_spans_at_the_gateway(moody: Any, tmp_path: Path) -> None:
    _, trace = infer(moody, FAILS)
    here = json.loads(moody.shoal("trace", trace, "--json").stdout)["spans"]
    document = json.loads(moody.shoal("trace", trace, "--json", elsewhere=tmp_path).stdout)
    assert document["silent"] == []
    assert [span["span"] for span in document["spans"]] == [span["span"] for span in here]
    assert "ModelInfer" in moody.shoal("trace", trace, elsewhere=tmp_path).stdout
    assert trace[:16] in moody.shoal("trace", elsewhere=tmp_path).stdout
    # Nothing that is not a trace or a job reaches the processes.
    with shoal.Client(moody.gateway) as client, pytest.raises(InvalidArgument, match="trace, job"):
        client.spans("nothing")
