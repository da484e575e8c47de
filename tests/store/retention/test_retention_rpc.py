"""SetRetention and ListRetention over the wire; rules applied by a running store; what an ingest is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from mesh.mongo import connect
from services.ingest.dispatch.remote import RemoteResults
from services.ingest.job import End, Outcome
from services.store.config import StoreConfig
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.store.conftest import Store, refused, running_store
from tests.store.test_result_rpc import BAD, get, put, result

pytestmark = pytest.mark.mongo

RESULTS, ANSWERS = pb.RetentionRule.COLLECTION_RESULTS, pb.RetentionRule.COLLECTION_ANSWERS


@pytest.fixture
async def sweeping(config: StoreConfig) -> AsyncIterator[Store]:
    """A store with a round of retention every 100 ms."""
    async with running_store(config.model_copy(update={"retention_ms": 100})) as running:
        yield running


async def rules(store: Store) -> list[pb.RetentionRule]:
    found = list((await store.stub.ListRetention(pb.ListRetentionRequest())).rules)
    for rule in found:
        assert rule.HasField("updated_at")
        rule.ClearField("updated_at")
    return found


def rule(collection: int, keep_s: int | None = None, tenant: str | None = None) -> pb.RetentionRule:
    keep = None if keep_s is None else Duration(seconds=keep_s)
    return pb.RetentionRule(collection=collection, keep=keep, tenant=tenant)


async def put_rule(store: Store, of: pb.RetentionRule, *, remove: bool = False) -> pb.SetRetentionResponse:
    return await store.stub.SetRetention(pb.SetRetentionRequest(rule=of, remove=remove))


async def aged(config: StoreConfig, *jobs: str) -> None:
    """Makes the results of these jobs a year old."""
    async with connect(config.mongo) as client:
        year = datetime.now(UTC) - timedelta(days=365)
        found = client[config.database].results
        await found.update_many({"_id": {"$in": list(jobs)}}, {"$set": {"recorded_at": year}})


async def test_rules_are_set_listed_and_removed(store: Store) -> None:
    assert await rules(store) == []
    await put_rule(store, rule(RESULTS, 3600))
    await put_rule(store, rule(RESULTS, None, ""))
    answer = await put_rule(store, rule(ANSWERS, 60, "a"))
    assert len(answer.rules) == 3
    assert await rules(store) == [rule(ANSWERS, 60, "a"), rule(RESULTS, 3600), rule(RESULTS, None, "")]
    await put_rule(store, rule(RESULTS, 7200))
    await put_rule(store, rule(RESULTS, None, ""), remove=True)
    await put_rule(store, rule(ANSWERS, None, "nobody's"), remove=True)
    assert await rules(store) == [rule(ANSWERS, 60, "a"), rule(RESULTS, 7200)]


async def test_hostile_rules_are_named_and_change_nothing(store: Store) -> None:
    await put_rule(store, rule(RESULTS, 3600))
    for wrong, word in [
        (pb.RetentionRule(), "collection"),
        (rule(77), "collection"),
        (rule(RESULTS, 1), "60 s"),
        (rule(RESULTS, -5), "keep"),
        (rule(RESULTS, 1 << 62), "keep"),
        (rule(RESULTS, 60, "t" * 1_025), "tenant"),
        (rule(pb.RetentionRule.COLLECTION_TOMBSTONES, 60), "86400 s"),
        (rule(pb.RetentionRule.COLLECTION_TOMBSTONES, 90_000, "t"), "tombstones"),
    ]:
        await refused(put_rule(store, wrong), BAD, "rule", word)
    assert await rules(store) == [rule(RESULTS, 3600)]


async def gone(store: Store, *jobs: str) -> None:
    """Waits until retention has removed the results of `jobs`."""

    async def are_gone() -> bool:
        request = pb.QueryResultsRequest(job_ids=list(jobs), omit_response=True)
        return not (await store.stub.QueryResults(request)).results

    await until(are_gone, f"the results of {jobs} are removed")


async def test_a_store_applies_its_rules_by_itself(sweeping: Store, config: StoreConfig) -> None:
    """Without coord and without etcd."""
    await put(sweeping, result("old"), result("new"))
    await aged(config, "old")
    assert (await get(sweeping, "old")).job_id == "old"
    await put_rule(sweeping, rule(RESULTS, 3600))
    await gone(sweeping, "old")
    await refused(get(sweeping, "old"), StatusCode.NOT_FOUND, "removed by retention")
    await get(sweeping, "new")


async def test_nobody_needs_to_have_it_applied_any_more(store: Store) -> None:
    call = store.stub.ApplyRetention(pb.ApplyRetentionRequest(token=1))
    await refused(call, StatusCode.UNIMPLEMENTED, "by itself", "SHOAL_STORE_RETENTION_MS")


async def test_what_ingest_asks_before_it_runs_a_job_again(sweeping: Store, config: StoreConfig) -> None:
    """A job in somebody's hands when its result went: ingest is told that it has ended, and how."""
    await put(sweeping, result("done"), result("failed", pb.Result.OUTCOME_FAILED, code=3, generation=2))
    await aged(config, "done", "failed")
    await put_rule(sweeping, rule(RESULTS, 60))
    await gone(sweeping, "done", "failed")
    ingest = RemoteResults(sweeping.channel)
    standing = await ingest.recorded_ends(["done", "failed", "none"])
    assert {job: (end.outcome, end.code, end.generation) for job, end in standing.items()} == {
        "done": (Outcome.SUCCEEDED, 0, 1),
        "failed": (Outcome.FAILED, 3, 2),
    }
    (ended,) = await ingest.put([result("done", pb.Result.OUTCOME_CANCELLED, code=1)], [""])
    assert ended == End(Outcome.SUCCEEDED, 0, ended.message)
    await refused(
        sweeping.stub.QueryResults(pb.QueryResultsRequest(include_removed=True)), BAD, "include_removed", "job_ids"
    )
