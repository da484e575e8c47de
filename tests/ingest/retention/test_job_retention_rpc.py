"""SetJobRetention and ListJobRetention over the wire, and a leader that acts on them."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from pymongo import AsyncMongoClient

from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh

S = grpc.StatusCode
DEAD, SUCCEEDED = pb.JOB_STATE_DEAD, pb.JOB_STATE_SUCCEEDED


async def put(client: Client, **fields: Any) -> pb.JobRetention:
    answer = await client.stub.SetJobRetention(pb.SetJobRetentionRequest(**fields), timeout=20)
    rule: pb.JobRetention = answer.rule
    return rule


async def rules(client: Client) -> dict[tuple[str, int | str], tuple[int, bool]]:
    answer = await client.stub.ListJobRetention(pb.ListJobRetentionRequest(), timeout=20)
    return {
        (one.tenant, "batches" if one.batches else one.state): (one.keep.seconds, one.inherited) for one in answer.rules
    }


async def test_rules_are_set_and_inherited(client: Client) -> None:
    tenant = uuid.uuid4().hex
    before = await rules(client)
    assert before["*", SUCCEEDED] == (7 * 86_400, True)
    assert before["*", DEAD] == (30 * 86_400, True)
    assert (await put(client, tenant=tenant, state=DEAD, keep=Duration(seconds=90))).keep.seconds == 90
    assert (await rules(client))[tenant, DEAD] == (90, False)
    assert not (await put(client, tenant=tenant, state=DEAD, for_ever=True)).HasField("keep")
    inherited = await put(client, tenant=tenant, state=DEAD, inherit=True)
    assert (inherited.keep.seconds, inherited.inherited) == (30 * 86_400, True)
    assert (tenant, DEAD) not in await rules(client)


async def test_batches_have_a_rule_of_their_own(client: Client) -> None:
    tenant = uuid.uuid4().hex
    assert (await rules(client))["*", "batches"] == (30 * 86_400, True)
    answer = await put(client, tenant=tenant, batches=True, keep=Duration(seconds=90))
    assert (answer.batches, answer.state, answer.keep.seconds, answer.inherited) == (True, 0, 90, False)
    assert (await rules(client))[tenant, "batches"] == (90, False)
    assert not (await put(client, tenant=tenant, batches=True, for_ever=True)).HasField("keep")
    inherited = await put(client, tenant=tenant, batches=True, inherit=True)
    assert (inherited.keep.seconds, inherited.inherited, inherited.batches) == (30 * 86_400, True, True)
    assert (tenant, "batches") not in await rules(client)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep": Duration(seconds=90)}, "state: expected a final state"),
        ({"state": pb.JOB_STATE_QUEUED, "keep": Duration(seconds=90)}, "state: expected a final state"),
        ({"state": 99, "keep": Duration(seconds=90)}, "state: not a job state"),
        ({"state": DEAD}, "keep, for_ever, inherit: set one of them"),
        ({"state": DEAD, "for_ever": False}, "keep, for_ever, inherit: set one of them"),
        ({"state": DEAD, "keep": Duration(seconds=59)}, "keep: from 0:01:00"),
        ({"state": DEAD, "keep": Duration(seconds=-1)}, "keep: must not be negative"),
        ({"state": DEAD, "keep": Duration(seconds=2**60)}, "keep: at most"),
        ({"state": DEAD, "for_ever": True, "tenant": "t" * 65}, "tenant: at most 64"),
        ({"state": DEAD, "batches": True, "for_ever": True}, "batches: not together with state"),
        ({"batches": True}, "keep, for_ever, inherit: set one of them"),
        ({"batches": True, "keep": Duration(seconds=59)}, "keep: from 0:01:00"),
    ],
    ids=range(12),
)
async def test_what_makes_no_sense_is_refused(client: Client, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await put(client, **fields)
    assert caught.value.code() is S.INVALID_ARGUMENT
    assert (caught.value.details() or "")[: len(says)] == says


async def test_the_leader_removes_what_is_over(
    own_mesh: FakeMesh, start_ingest: StartIngest, mongo_uri: str, mongo_database: str
) -> None:
    ingest = start_ingest(retention_round_ms=100)
    await ingest.until_ready()
    client = Client(ingest.address)
    key = uuid.uuid4().hex
    old, young = [(await client.submit(idempotency_key=one)).job for one in (key, key + "x")]
    for one in (old, young):
        await client.ended(one.id)
    async with AsyncMongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as mongo:
        jobs = mongo[mongo_database]["jobs"]
        # As if it had been submitted, and had ended, two months ago.
        document = await jobs.find_one_and_delete({"_id": old.id})
        assert document is not None
        document["_id"] = "01" + "0" * 24
        document["updated_at"] = document["updated_at"].replace(year=2020)
        await jobs.insert_one(document)

        async def is_gone() -> bool:
            return await jobs.count_documents({"_id": document["_id"]}) == 0

        await until(is_gone, "the old job is removed")
    assert (await client.get(young.id)).state == SUCCEEDED
    assert not (await client.submit(idempotency_key=key)).existed  # Its key is free again.
    await client.channel.close()
