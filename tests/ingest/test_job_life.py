"""A job's life, from submit to its one result, through a real process and a real MongoDB."""

from __future__ import annotations

from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.faults import Client, FakeMesh


async def test_a_job_runs_and_its_result_is_recorded(client: Client, mesh: FakeMesh) -> None:
    accepted = await client.submit(data=b"tensor", tenant="t", labels={"a.b": "$c"})
    assert accepted.job.state == pb.JOB_STATE_QUEUED
    assert not accepted.existed
    job = await client.ended(accepted.job.id)
    assert job.state == pb.JOB_STATE_SUCCEEDED
    assert job.attempts == 1
    assert [step.state for step in job.transitions] == [
        pb.JOB_STATE_QUEUED,
        pb.JOB_STATE_RUNNING,
        pb.JOB_STATE_SUCCEEDED,
    ]
    assert all(step.instance == "local/ingest-0" for step in job.transitions)
    assert dict(job.labels) == {"a.b": "$c"}
    result = mesh.store.results[job.id]
    assert list(result.response.raw_output_contents) == [b"tensor"]
    assert result.instance == "local/infer-0"
    assert not result.response.parameters  # Only ingest had asked for an explanation.
    assert result.tenant == "t"
    assert result.attempt == 1
