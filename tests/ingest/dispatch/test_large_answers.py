"""An answer that no message to the store can hold ends its job, and only that."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.rpc.limits import MESSAGE_BYTES
from shoal.errors import Code
from shoal.inference.v2 import inference_pb2
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.faults import Client, FakeMesh, echo

pytestmark = pytest.mark.mongo


async def test_a_job_whose_answer_is_too_large_to_be_stored_fails_and_harms_no_other(
    client: Client, mesh: FakeMesh
) -> None:
    async def answers(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        if request.model_name != "large":
            return await echo(request, context)
        # It comes in a message, and is too large for one with the rest of the result.
        return inference_pb2.ModelInferResponse(raw_output_contents=[bytes(MESSAGE_BYTES - 4_096)])

    mesh.infer.model = answers
    labels = {f"{n}": "x" * 256 for n in range(32)}
    large = await client.submit(model="large", labels=labels)
    small = [await client.submit(model="small") for _ in range(10)]
    for each in small:
        assert (await client.ended(each.job.id)).state == pb.JOB_STATE_SUCCEEDED
    ended = await client.ended(large.job.id)
    assert (ended.state, ended.last_code, ended.attempts) == (pb.JOB_STATE_FAILED, Code.FAILED_PRECONDITION, 1)
    assert f"a message holds at most {MESSAGE_BYTES - (1 << 20)}" in ended.last_message
    assert "the model answered, but the store refuses the result" in ended.last_message
    (put,) = mesh.store.puts[large.job.id]
    assert not put.HasField("response")
