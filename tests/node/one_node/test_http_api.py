"""JSON calls on a real node with curl, as docs/http-api.md shows them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.node, pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")]

JOB = {
    "request": {
        "model_name": "double",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 4], "contents": {"fp32_contents": [1, 2, 3, 4]}},
        ],
    },
    "labels": {"from": "curl"},
}


def curl(node: Any, path: str, *arguments: str) -> tuple[int, Any]:
    """Return the status and the JSON of a response."""
    command = ["curl", "--silent", "--noproxy", "*", "--max-time", "30", "--write-out", "\n%{http_code}", *arguments]
    done = subprocess.run([*command, f"http://{node.gateway}{path}"], capture_output=True, text=True, check=True)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text)


def post(node: Any, path: str, body: Any) -> tuple[int, Any]:
    return curl(node, path, "--header", "content-type: application/json", "--data", json.dumps(body))


def test_a_job_its_result_and_its_lists(running: Any) -> None:
    status, submitted = post(running, "/shoal/v1/jobs", JOB)
    assert status == 200, submitted
    job = submitted["job"]["id"]
    for _ in range(12):
        status, found = curl(running, f"/shoal/v1/results/{job}?wait=5s")
        if status != 404:
            break
    assert (status, found["result"]["outcome"]) == (200, "OUTCOME_SUCCEEDED")
    [tensor] = found["result"]["response"]["outputs"]
    raw = base64.b64decode(found["result"]["response"]["raw_output_contents"][0])
    assert (tensor["name"], np.frombuffer(raw, np.float32).tolist()) == ("y", [2, 4, 6, 8])
    status, read = curl(running, f"/shoal/v1/jobs/{job}")
    assert (status, read["job"]["labels"]) == (200, {"from": "curl"})
    status, listed = curl(running, "/shoal/v1/jobs?model_name=double&page_size=1000")
    assert status == 200
    assert job in {each["id"] for each in listed["jobs"]}
    assert {model["name"] for model in curl(running, "/shoal/v1/models")[1]["models"]} == {"double", "slow"}
    assert {each["service"] for each in curl(running, "/shoal/v1/instances")[1]["instances"]} >= {"infer", "store"}


def test_errors_are_named(running: Any) -> None:
    assert post(running, "/shoal/v1/jobs", {"request": {"model_name": "double", "input": []}}) == (
        400,
        {"code": 3, "message": "shoal.ingest.v1.SubmitRequest.request has no field 'input'", "details": []},
    )
    status, error = post(running, "/shoal/v1/jobs", {"request": {}})
    assert (status, error["code"]) == (400, 3)
    assert "model_name" in error["message"]
    status, error = curl(running, "/shoal/v1/jobs/01J0000000000000000000000A")
    assert (status, error["code"]) == (404, 5)
    # curl's own content type.
    assert curl(running, "/shoal/v1/jobs", "--data", json.dumps(JOB))[0] == 415


def test_an_inference_that_is_answered_later_and_its_watch(running: Any) -> None:
    infer = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    prefer = ("--header", "prefer: respond-async", "--header", "idempotency-key: later-1")
    for existed in (False, True):
        status, found = curl(running, "/v2/models/double/infer", *prefer, "--data", json.dumps(infer))
        assert (status, found["existed"]) == (202, existed), found
    job = found["job"]["id"]
    command = ["curl", "--silent", "--no-buffer", "--noproxy", "*", "--max-time", "60"]
    watched = subprocess.run(
        [*command, f"http://{running.gateway}/shoal/v1/jobs/{job}:watch"], capture_output=True, text=True, check=True
    )
    states = [json.loads(line)["job"]["state"] for line in watched.stdout.splitlines() if line]
    assert states[-1] == "JOB_STATE_SUCCEEDED"
    _, found = curl(running, f"/shoal/v1/results/{job}?wait=5s")
    raw = base64.b64decode(found["result"]["response"]["raw_output_contents"][0])
    assert np.frombuffer(raw, np.float32).tolist() == [2, 4, 6, 8]
    streamed = subprocess.run(
        [*command, f"http://{running.gateway}/shoal/v1/results:stream?filter.job_ids={job}&omit_response=true"],
        capture_output=True,
        text=True,
        check=True,
    )
    pages = [json.loads(line) for line in streamed.stdout.splitlines() if line]
    assert [result["job_id"] for page in pages for result in page["results"]] == [job]
    assert pages[-1]["complete"]
